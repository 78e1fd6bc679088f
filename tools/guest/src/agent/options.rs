//! What follows a command's name: an optional object, then `key=value` pairs.

use std::path::PathBuf;

use anyhow::{Context, Result};

pub(crate) struct Options {
    object: Option<String>,
    values: Vec<(String, String)>,
}

impl Options {
    pub(crate) fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut options = Self { object: None, values: vec![] };
        for word in words {
            match word.split_once('=') {
                Some((key, value)) => options.values.push((key.to_owned(), value.to_owned())),
                None if options.object.is_none() => options.object = Some(word.to_owned()),
                None => anyhow::bail!("a second object: {word}"),
            }
        }
        Ok(options)
    }

    /// The name of the disk that the command is about, such as `vda`.
    pub(crate) fn disk(&self) -> Result<String> {
        self.object.clone().context("the command needs a disk, such as vda")
    }

    /// The object as a path: a disk's name stands for its device.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        let object = self.disk()?;
        Ok(if object.starts_with('/') { object.into() } else { PathBuf::from("/dev").join(object) })
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        let value = self.values.iter().find(|(name, _)| name == key);
        value.map(|(_, value)| value.as_str()).with_context(|| format!("the command needs {key}="))
    }

    pub(crate) fn number(&self, key: &str) -> Result<u64> {
        let text = self.text(key)?;
        text.parse().with_context(|| format!("{key}={text} is not a number"))
    }
}
