//! Nothing that destroys data happens unless a person named it.

use crate::arguments::Consent;
use std::io::{BufRead, IsTerminal, Write};
use vflash::control::api::{ErrorCode, Failure};

impl Consent {
    /// Runs `attempt` with what was confirmed so far. If more has to be destroyed, asks for it as
    /// the arguments say, and tries once more.
    pub(crate) fn obtain<T>(
        &self,
        attempt: impl Fn(Vec<String>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut confirm = self.confirm.clone();
        let failure = match attempt(confirm.clone()) {
            Err(failure) if failure.code == ErrorCode::Unconfirmed => failure,
            result => return result,
        };
        if !self.yes {
            ask(&failure, ", or --yes for all")?;
        }
        confirm.extend(failure.unconfirmed);
        attempt(confirm)
    }
}

/// As [`Consent::obtain`], of what `--yes` does not cover: it must be named.
pub(crate) fn obtain_named<T>(
    confirm: &[String],
    attempt: impl Fn(Vec<String>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let failure = match attempt(confirm.to_vec()) {
        Err(failure) if failure.code == ErrorCode::Unconfirmed => failure,
        result => return result,
    };
    ask(&failure, "")?;
    attempt([confirm, &failure.unconfirmed[..]].concat())
}

/// Has each name typed. `or`: what else could be said.
fn ask(failure: &Failure, or: &str) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        let mut failure = failure.clone();
        let named: Vec<_> =
            failure.unconfirmed.iter().map(|name| format!("--confirm {name}")).collect();
        failure.message = format!("{}: add {}{or}", failure.message, named.join(" "));
        return Err(failure);
    }
    eprintln!("{}", failure.message);
    let mut input = std::io::stdin().lock();
    for name in &failure.unconfirmed {
        eprint!("Type {name} to destroy what it holds: ");
        // A prompt that cannot be shown is followed by an answer that does not match.
        let _ = std::io::stderr().flush();
        let mut line = String::new();
        let read = input.read_line(&mut line);
        if read.is_err() || line.trim() != name {
            let text = format!("`{}` is not `{name}`: nothing was done", line.trim());
            return Err(Failure::new(ErrorCode::Unconfirmed, text));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn unconfirmed() -> Failure {
        let mut failure = Failure::new(ErrorCode::Unconfirmed, "a/b would be destroyed");
        failure.unconfirmed = vec!["a/b".into()];
        failure
    }

    #[test]
    fn yes_confirms_what_the_daemon_asks_for_and_nothing_more() {
        let attempts = RefCell::new(Vec::new());
        let consent = Consent { yes: true, confirm: Vec::new() };
        let result = consent.obtain(|confirm| {
            attempts.borrow_mut().push(confirm.clone());
            if confirm.is_empty() { Err(unconfirmed()) } else { Ok(()) }
        });
        assert_eq!(result, Ok(()));
        assert_eq!(*attempts.borrow(), [Vec::new(), vec!["a/b".to_owned()]]);
    }

    #[test]
    fn other_failures_are_not_tried_again() {
        let attempts = RefCell::new(0);
        let consent = Consent { yes: true, confirm: Vec::new() };
        let result: Result<(), _> = consent.obtain(|_| {
            *attempts.borrow_mut() += 1;
            Err(Failure::new(ErrorCode::Busy, "attached"))
        });
        assert_eq!(result.unwrap_err().code, ErrorCode::Busy);
        assert_eq!(*attempts.borrow(), 1);
    }
}
