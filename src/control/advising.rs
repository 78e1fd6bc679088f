//! What more or less flash would bring each cached disk, by what its guest has read.

use super::api::{ErrorCode, Failure};
use super::api_cached::{Advice, AdviceMove, Curve, CurvePoint, DiskAdvice};
use super::caching::ANSWER_WAIT;
use super::engine::Engine;
use super::served::Served;
use crate::base::units::GIB;
use crate::cache::CacheMessage;
use crate::cache::curve::{MissCurve, Standing, best_move, blocks_of};
use crate::cache::policy::BLOCK_BYTES;
use crate::manifest::CacheSettings;

type Result<T> = std::result::Result<T, Failure>;

/// Points of a curve that is told.
const POINTS: u64 = 128;

/// A cached disk and its curve.
pub(super) struct Curved {
    pub served: Served,
    pub size_bytes: u64,
    pub curve: MissCurve,
}

impl Curved {
    fn of(served: Served) -> crate::base::Result<Self> {
        let curve = served.ask(ANSWER_WAIT, |reply| CacheMessage::Curve { reply })?;
        let size_bytes = served.facts()?.size_bytes;
        Ok(Self { served, size_bytes, curve })
    }
}

/// Of a million reads, those that hit in a cache of so many bytes.
fn hits(curve: &MissCurve, bytes: u64) -> u64 {
    ((1.0 - curve.miss_ratio(blocks_of(bytes))) * 1e6).round() as u64
}

impl Engine {
    pub fn curve(&self, name: &str) -> Result<Curve> {
        let (served, _) = self.cached(&self.home_of(name)?.name)?;
        let Curved { size_bytes, curve, .. } = Curved::of(served)?;
        let most = (curve.blocks_max() * BLOCK_BYTES).max(size_bytes);
        let step = |index: u64| (u128::from(most) * u128::from(index) / u128::from(POINTS)) as u64;
        let mut sizes: Vec<u64> = (0..=POINTS).map(step).chain([size_bytes]).collect();
        sizes.iter_mut().for_each(|bytes| *bytes = *bytes / BLOCK_BYTES * BLOCK_BYTES);
        sizes.sort_unstable();
        sizes.dedup();
        let point =
            |size_bytes| CurvePoint { size_bytes, hits_per_million: hits(&curve, size_bytes) };
        Ok(Curve {
            name: name.to_owned(),
            size_bytes,
            reads: curve.reads() as u64,
            points: sizes.into_iter().map(point).collect(),
        })
    }

    /// Cached disks that are served, with their curves; those that do not answer are left out.
    pub(super) fn curves_of(&self, wanted: impl Fn(&CacheSettings) -> bool) -> Vec<Curved> {
        let served: Vec<Served> = self.state().volumes.values().cloned().collect();
        let wanted = |served: &Served| {
            let of_it = served.settings.cache.as_ref().is_some_and(&wanted);
            served.home.is_none() && served.cached.is_some() && of_it
        };
        let open = served.into_iter().filter(wanted);
        open.filter_map(|served| Curved::of(served).ok()).collect()
    }

    /// `step_bytes`: how much more or less; a gibibyte unless told otherwise.
    pub fn advice(&self, step_bytes: Option<u64>) -> Result<Advice> {
        let step_bytes = step_bytes.unwrap_or(GIB);
        if blocks_of(step_bytes) == 0 {
            let text = format!("`stepBytes={step_bytes}`: write {BLOCK_BYTES} or more");
            return Err(Failure::new(ErrorCode::Invalid, text));
        }
        let curved = self.curves_of(|_| true);
        let pools = self.open_pools();
        let free: Vec<u64> =
            pools.iter().map(|pool| blocks_of(pool.facts().space.free_bytes)).collect();
        let standing = |disk| standing(disk, |name| pools.iter().position(|p| p.name == name));
        let standings: Vec<Standing> = curved.iter().map(standing).collect();
        let best = best_move(&standings, &free, blocks_of(step_bytes));
        let name = |index: usize| curved.get(index).map(|disk| disk.served.name.clone());
        let best = best.and_then(|best| {
            Some(AdviceMove {
                from: best.from.and_then(name),
                to: name(best.to)?,
                bytes: step_bytes,
                gain_per_million: (best.gain * 1e6).round() as u64,
            })
        });
        let disks = curved.iter().map(|disk| advised(disk, step_bytes)).collect();
        Ok(Advice { step_bytes, disks, best })
    }
}

fn standing(disk: &Curved, pool: impl Fn(&str) -> Option<usize>) -> Standing<'_> {
    let share = disk.served.settings.cache.as_ref().and_then(|cache| cache.share);
    Standing {
        curve: &disk.curve,
        blocks: blocks_of(disk.size_bytes),
        min: share.map_or(0, |share| blocks_of(share.minimum_bytes)),
        space: pool(&disk.served.pool.name).unwrap_or(usize::MAX),
    }
}

fn advised(disk: &Curved, step_bytes: u64) -> DiskAdvice {
    let Curved { served, size_bytes, curve } = disk;
    DiskAdvice {
        name: served.name.clone(),
        pool: served.pool.name.clone(),
        size_bytes: *size_bytes,
        reads: curve.reads() as u64,
        less_hits_per_million: hits(curve, size_bytes.saturating_sub(step_bytes)),
        hits_per_million: hits(curve, *size_bytes),
        more_hits_per_million: hits(curve, size_bytes.saturating_add(step_bytes)),
    }
}
