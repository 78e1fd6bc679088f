//! A run made of steps: a line when one begins, a line when it ends, a table at the end.

use std::time::{Duration, Instant};

use anyhow::Result;

/// What a step came to.
struct Step {
    name: String,
    took: Duration,
    result: String,
    passed: bool,
}

/// The steps of one run.
pub(crate) struct Steps {
    started: Instant,
    steps: Vec<Step>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), steps: vec![] }
    }

    /// Runs one step, which says in a few words what came of it. Gives what it made, if it passed.
    pub(crate) fn run<T>(
        &mut self,
        name: &str,
        step: impl FnOnce() -> Result<(T, String)>,
    ) -> Option<T> {
        println!("[{:6.1} s] {name} …", self.started.elapsed().as_secs_f64());
        let begun = Instant::now();
        let outcome = step();
        let took = begun.elapsed();
        let (made, result) = match outcome {
            Ok((made, result)) => (Some(made), result),
            Err(error) => (None, format!("{error:#}")),
        };
        let passed = made.is_some();
        let word = if passed { "ok" } else { "FAILED" };
        let now = self.started.elapsed().as_secs_f64();
        println!("[{now:6.1} s] {name}: {word}, {result} ({:.1} s)", took.as_secs_f64());
        self.steps.push(Step { name: name.to_owned(), took, result, passed });
        made
    }

    pub(crate) fn passed(&self) -> usize {
        self.steps.iter().filter(|step| step.passed).count()
    }

    pub(crate) fn failed(&self) -> usize {
        self.steps.len() - self.passed()
    }

    /// Prints all steps, one line each.
    pub(crate) fn print_table(&self) {
        let width = self.steps.iter().map(|step| step.name.len()).max().unwrap_or(0);
        println!("\n{:width$}  {:>8}  result", "step", "time");
        for step in &self.steps {
            let word = if step.passed { "" } else { "FAILED: " };
            let first_line = step.result.lines().next().unwrap_or_default();
            let seconds = step.took.as_secs_f64();
            println!("{:width$}  {seconds:6.1} s  {word}{first_line}", step.name);
        }
        println!("{:width$}  {:6.1} s", "all", self.started.elapsed().as_secs_f64());
    }
}
