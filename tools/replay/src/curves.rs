//! A trace through miss-ratio curves, sampled and exact.

use crate::trace::Trace;
use vflash::cache::curve::{Exact, MissCurve, Sampler};

/// Both curves of a trace, and how they compare.
pub struct Curves {
    pub sampled: MissCurve,
    pub exact: MissCurve,
    /// Mean difference of miss ratios up to the footprint.
    pub error: f64,
    pub footprint_blocks: u64,
    pub sampler_bytes: usize,
}

/// Every access counts, as in [`crate::simulate::Writes::AsReads`].
pub fn run(trace: &Trace, samples_max: usize) -> Curves {
    let (mut sampler, mut exact) = (Sampler::new(samples_max), Exact::default());
    for (block, _) in trace.accesses() {
        sampler.read(block);
        exact.read(block);
    }
    let footprint_blocks = exact.footprint_blocks();
    let (sampled, exact) = (sampler.curve(), exact.curve());
    let error = sampled.mean_error(&exact, footprint_blocks);
    let sampler_bytes = sampler.memory_bytes();
    Curves { sampled, exact, error, footprint_blocks, sampler_bytes }
}
