//! vflash, the command line.
//!
//! Reading order: [`arguments`] (what can be said), [`verbs`], [`pools`], [`backings`], [`advice`],
//! [`attach`] (what is done), [`client`] and [`http`] (how the daemon is asked), [`consent`],
//! [`output`], [`manual`].

#![forbid(unsafe_code)]

mod advice;
mod arguments;
mod attach;
mod backings;
mod caches;
mod client;
mod consent;
mod events;
mod http;
mod journals;
mod manual;
mod output;
mod pools;
mod tables;
mod verbs;

use arguments::{Arguments, BackingVerb, DumpVerb, PoolVerb, Verb};
use clap::Parser;
use client::Client;
use std::process::ExitCode;
use vflash::control::api::{ErrorCode, Failure};

/// `vflash check`, `vflash pool check` and `vflash backing` answer as fsck does.
const CHECK_REPAIRED: u8 = 1;
const CHECK_DAMAGED: u8 = 4;
const CHECK_IMPOSSIBLE: u8 = 8;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let check = matches!(arguments.verb, Verb::Pool(PoolVerb::Check { .. }) | Verb::Check(_));
    let backing = matches!(arguments.verb, Verb::Backing(_));
    match run(arguments) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("vflash: {failure}");
            match failure.code {
                ErrorCode::Corrupt if backing => ExitCode::from(CHECK_DAMAGED),
                _ if check || backing => ExitCode::from(CHECK_IMPOSSIBLE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { run_dir, output, verb } = arguments;
    let client = Client::new(&run_dir);
    match verb {
        Verb::Apply(change) => verbs::apply(&client, output, &change),
        Verb::Diff(files) => verbs::diff(&client, output, &files),
        Verb::Delete(delete) => verbs::delete(&client, output, &delete),
        Verb::Get(get) => verbs::get(&client, output, &get),
        Verb::Describe { object } => verbs::describe(&client, output, &object),
        Verb::Export => verbs::export(&client, output),
        Verb::Status => verbs::status(&client, output),
        Verb::Resize(resize) => verbs::resize(&client, output, &resize),
        Verb::Reclaim(reclaim) => verbs::reclaim(&client, output, &reclaim),
        Verb::Attach(attach) => attach::attach(&client, output, &attach),
        Verb::Detach(detach) => attach::detach(&client, output, &detach),
        Verb::Drain(drain) => caches::drain(&client, output, &drain),
        Verb::Points { volume } => caches::points(&client, output, &volume),
        Verb::Mark { volume, name } => caches::mark(&client, output, &volume, &name),
        Verb::Checkpoint { volume } => caches::checkpoint(&client, output, &volume),
        Verb::Mrc(curve) => advice::curve(&client, output, &curve),
        Verb::Advise(advise) => advice::advise(&client, output, &advise),
        Verb::Mode(mode) => caches::mode(&client, output, &mode),
        Verb::Check(check) => {
            let verdict = journals::check(&client, &run_dir, output, &check)?;
            return Ok(match verdict {
                journals::Verdict::Clean => ExitCode::SUCCESS,
                journals::Verdict::Repaired => ExitCode::from(CHECK_REPAIRED),
                journals::Verdict::Damaged => ExitCode::from(CHECK_DAMAGED),
            });
        }
        Verb::Dump(DumpVerb::Journal(dump)) => journals::dump(&client, &run_dir, output, &dump),
        Verb::Events(events) => events::events(&client, output, &events),
        Verb::Pool(PoolVerb::Create(create)) => pools::create(&client, output, &create),
        Verb::Pool(PoolVerb::Show { pool, wait }) => pools::show(&client, output, &pool, wait),
        Verb::Pool(PoolVerb::Check { pool }) => {
            let clean = pools::check(&client, output, &pool)?;
            return Ok(if clean { ExitCode::SUCCESS } else { ExitCode::from(CHECK_DAMAGED) });
        }
        Verb::Pool(PoolVerb::Grow { pool }) => pools::grow(&client, output, &pool),
        Verb::Pool(PoolVerb::Close { pool, force }) => pools::close(&client, output, &pool, force),
        Verb::Backing(BackingVerb::Show(show)) => backings::show(output, &show),
        Verb::Backing(BackingVerb::Recover(recover)) => backings::recover(output, &recover),
        Verb::Completion { shell } => manual::completion(shell),
        Verb::Man { dir } => manual::man(dir.as_deref()),
    }?;
    Ok(ExitCode::SUCCESS)
}
