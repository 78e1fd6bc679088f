//! The agent's answers: one line, `ok key=value …` or `error what failed`.

use std::fmt::{Display, Write};

use anyhow::{Context, Result, bail};

/// The first word the agent says after each boot of the guest.
pub const READY: &str = "ready";

/// Named values of one answer, in the order they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    fields: Vec<(String, String)>,
}

impl Reply {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a value; blanks in it become underscores, since blanks part the fields.
    pub fn with(mut self, key: &str, value: impl Display) -> Self {
        let value = value.to_string().replace(char::is_whitespace, "_");
        self.fields.push((key.to_owned(), value));
        self
    }

    /// The line that [`Reply::parse`] reads back.
    pub fn line(&self) -> String {
        self.fields.iter().fold("ok".to_owned(), |mut line, (key, value)| {
            write!(line, " {key}={value}").expect("writing to a string cannot fail");
            line
        })
    }

    /// Reads an answer; an `error` line becomes an error that carries its text.
    pub fn parse(line: &str) -> Result<Self> {
        if let Some(text) = line.strip_prefix("error ") {
            bail!("{text}");
        }
        let mut words = line.split_whitespace();
        if words.next() != Some("ok") {
            bail!("the guest's agent said {line:?}, neither ok nor error");
        }
        let fields = words
            .map(|word| {
                let (key, value) =
                    word.split_once('=').with_context(|| format!("no '=' in {word:?}"))?;
                Ok((key.to_owned(), value.to_owned()))
            })
            .collect::<Result<_>>()?;
        Ok(Self { fields })
    }

    /// The value of `key`, empty if it was given as such.
    pub fn text(&self, key: &str) -> Result<&str> {
        let field = self.fields.iter().find(|(name, _)| name == key);
        field
            .map(|(_, value)| value.as_str())
            .with_context(|| format!("the guest did not say {key}: {}", self.line()))
    }

    /// The value of `key` as a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        let text = self.text(key)?;
        text.parse().with_context(|| format!("{key}={text} is not a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_reads_back() {
        let reply = Reply::new().with("size", 4096).with("cache", "write back");
        let parsed = Reply::parse(&reply.line()).unwrap();
        assert_eq!(parsed, reply);
        assert_eq!(parsed.number("size").unwrap(), 4096);
        assert_eq!(parsed.text("cache").unwrap(), "write_back");
    }

    #[test]
    fn errors_and_nonsense_are_errors() {
        assert_eq!(Reply::parse("error no such disk").unwrap_err().to_string(), "no such disk");
        assert!(Reply::parse("okay").is_err());
        assert!(Reply::parse("ok size").is_err());
        assert!(Reply::new().with("a", "x").number("a").is_err());
    }
}
