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

/// Has each name typed, if somebody is there to type. `or`: what else could be said.
fn ask(failure: &Failure, or: &str) -> Result<(), Failure> {
    let input = std::io::stdin();
    let mut typed = input.is_terminal().then(|| input.lock());
    let typed = typed.as_mut().map(|input| input as &mut dyn BufRead);
    ask_on(failure, or, typed, &mut std::io::stderr())
}

fn ask_on(
    failure: &Failure,
    or: &str,
    input: Option<&mut dyn BufRead>,
    output: &mut dyn Write,
) -> Result<(), Failure> {
    let Some(input) = input else {
        let named = failure.unconfirmed.iter().map(|name| format!("--confirm {name}"));
        let named = named.collect::<Vec<_>>().join(" ");
        let message = format!("{}; nothing was done: add {named}{or}", failure.message);
        return Err(Failure { message, ..failure.clone() });
    };
    // A prompt that cannot be shown is followed by an answer that does not match.
    let _ = writeln!(output, "{failure}");
    for name in &failure.unconfirmed {
        let _ = write!(output, "Type {name} to go on: ");
        let _ = output.flush();
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
    use vflash::control::api::Mistake;

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

    /// What a person is shown, and how it ends.
    fn asked(failure: &Failure, typed: Option<&str>) -> (String, Result<(), Failure>) {
        let mut input = typed.map(str::as_bytes);
        let mut output = Vec::new();
        let input = input.as_mut().map(|input| input as &mut dyn BufRead);
        let end = ask_on(failure, ", or --yes for all", input, &mut output);
        (String::from_utf8(output).unwrap(), end)
    }

    #[test]
    fn a_person_is_shown_what_would_go_and_that_nothing_was_done_only_at_the_end() {
        let place = Mistake { file: "vm.yaml".into(), line: 3, column: 5, message: "8MiB".into() };
        let failure = Failure { mistakes: vec![place], ..unconfirmed() };
        let shown = "a/b would be destroyed\nvm.yaml:3:5: 8MiB\nType a/b to go on: ";
        assert_eq!(asked(&failure, Some("a/b\n")), (shown.to_owned(), Ok(())));
        let (text, end) = asked(&failure, Some("yes\n"));
        assert_eq!(text, shown);
        assert_eq!(end.unwrap_err().message, "`yes` is not `a/b`: nothing was done");
        let (text, end) = asked(&failure, None);
        assert_eq!(text, "");
        assert_eq!(
            end.unwrap_err().to_string(),
            "a/b would be destroyed; nothing was done: add --confirm a/b, or --yes for all\n\
             vm.yaml:3:5: 8MiB"
        );
    }
}
