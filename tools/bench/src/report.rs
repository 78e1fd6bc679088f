//! What a back end can do wrong, as an error with a kind, so that it can be counted.

use crate::Result;
use serde::Serialize;

/// The four ways in which a back end breaks its promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViolationKind {
    /// A request never completed.
    Lost,
    /// A request completed twice, or before its status was written.
    Doubled,
    /// Wrong bytes, a wrong status or a wrong length: an acknowledged write is gone, or was done
    /// again after a later one, or is torn, or lies elsewhere.
    Wrong,
    /// A request completed and the driver, which had asked for it, was not interrupted: a guest
    /// would sleep on.
    Silent,
}

/// A promise that a back end broke.
#[derive(Debug)]
pub struct Violation {
    pub kind: ViolationKind,
    pub text: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl std::error::Error for Violation {}

/// An error of `kind`.
pub fn violation<T>(kind: ViolationKind, text: String) -> Result<T> {
    Err(Box::new(Violation { kind, text }))
}

/// Violations that were found, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Violations {
    /// Requests that never completed.
    pub lost: u32,
    /// Completions that came twice.
    pub doubled: u32,
    /// Wrong bytes, status bytes or lengths.
    pub wrong: u32,
    /// Completions without the interrupt that was asked for.
    pub silent: u32,
}

impl Violations {
    /// Counts `error` if it is a violation; else gives it back.
    pub fn count(&mut self, error: Box<dyn std::error::Error + Send + Sync>) -> Result<()> {
        let Some(violation) = error.downcast_ref::<Violation>() else { return Err(error) };
        *match violation.kind {
            ViolationKind::Lost => &mut self.lost,
            ViolationKind::Doubled => &mut self.doubled,
            ViolationKind::Wrong => &mut self.wrong,
            ViolationKind::Silent => &mut self.silent,
        } += 1;
        Ok(())
    }

    pub fn total(&self) -> u32 {
        self.lost + self.doubled + self.wrong + self.silent
    }
}

/// The value below which `share` of the sorted `values` lie; 0 if there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_are_counted_by_kind_and_other_errors_are_not() {
        let mut found = Violations::default();
        let error = violation::<()>(ViolationKind::Doubled, "twice".into()).unwrap_err();
        assert_eq!(error.to_string(), "twice");
        found.count(error).unwrap();
        assert_eq!((found.doubled, found.total()), (1, 1));
        assert!(found.count("no such file".into()).is_err());
        assert_eq!(found.total(), 1);
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&values, 0.5), 50.0);
        assert_eq!(quantile(&values, 0.99), 99.0);
        assert_eq!(quantile(&values, 1.0), 100.0);
        assert_eq!(quantile(&values[..1], 0.5), 1.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
