//! `/metrics`: every pool and every volume, in the Prometheus text format.

use super::caching::CACHE_COUNTERS;
use super::engine::Engine;
use super::pool::OpenPool;
use super::served::Served;
use crate::cache::CacheState;
use crate::cache::status::CacheGauges;
use crate::flash::{Space, VolumeCounters};
use crate::metrics::{Exposition, MetricKind, VolumeSeries, write_volumes};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type SpaceField = (&'static str, fn(&Space) -> u64);

/// Labels of `vflash_pool_space_bytes`.
const SPACE: [SpaceField; 4] = [
    ("allocated", |space| space.allocated_bytes),
    ("free", |space| space.free_bytes),
    ("scrub", |space| space.scrub_bytes),
    ("metadata", |space| space.metadata_bytes),
];

type Counter = (&'static str, &'static str, fn(&VolumeCounters) -> &AtomicU64);

/// What a flash volume counts besides requests.
const COUNTERS: [Counter; 5] = [
    (
        "vflash_volume_bounced_pieces_total",
        "Pieces copied through a buffer because the drive cannot take the guest's memory.",
        |counters| &counters.bounced,
    ),
    (
        "vflash_volume_merged_blocks_total",
        "Blocks read, merged and written because a request covered them in part.",
        |counters| &counters.merged,
    ),
    (
        "vflash_volume_zeros_written_total",
        "Pieces zeroed by writing zeros because the drive can neither zero nor discard.",
        |counters| &counters.zeros_written,
    ),
    ("vflash_volume_extents_mapped_total", "Extents mapped on first write.", |counters| {
        &counters.extents_mapped
    }),
    ("vflash_volume_extents_unmapped_total", "Extents given back by a discard.", |counters| {
        &counters.extents_unmapped
    }),
];

impl Engine {
    /// The whole page.
    pub fn prometheus(&self) -> String {
        let mut page = Exposition::new();
        let status = self.summary();
        page.family("vflash_info", MetricKind::Gauge, "The daemon; always 1.")
            .sample(&[("version", &status.version)], 1);
        page.family(
            "vflash_problems",
            MetricKind::Gauge,
            "Pools and volumes not served as wanted.",
        )
        .sample(&[], status.problems.len());
        write_pools(&mut page, &self.open_pools());
        let volumes: Vec<Served> = self.state().volumes.values().cloned().collect();
        write_served(&mut page, &volumes);
        write_cached(&mut page, &volumes);
        page.into_text()
    }
}

fn write_pools(page: &mut Exposition, pools: &[Arc<OpenPool>]) {
    let facts: Vec<_> = pools.iter().map(|pool| (&pool.name, pool.facts(), pool.scrub())).collect();
    let mut space = page.family(
        "vflash_pool_space_bytes",
        MetricKind::Gauge,
        "Where the bytes of a pool are; all uses add up to its size.",
    );
    for (name, facts, _) in &facts {
        for (used_as, bytes) in SPACE {
            space.sample(&[("pool", name), ("use", used_as)], bytes(&facts.space));
        }
    }
    let mut provisioned = page.family(
        "vflash_pool_provisioned_bytes",
        MetricKind::Gauge,
        "Sizes of all volumes, thin ones included.",
    );
    for (name, facts, _) in &facts {
        provisioned.sample(&[("pool", name)], facts.space.provisioned_bytes);
    }
    let mut fenced = page.family(
        "vflash_pool_fenced",
        MetricKind::Gauge,
        "1 if changes are refused because the outcome of a commit is open.",
    );
    for (name, facts, _) in &facts {
        fenced.sample(&[("pool", name)], u8::from(facts.fenced));
    }
    let mut failed = page.family(
        "vflash_pool_keeper_failed",
        MetricKind::Gauge,
        "1 if the pool's keeper has ended by a defect: nothing is mapped or changed any more.",
    );
    for pool in pools {
        failed.sample(&[("pool", &pool.name)], u8::from(pool.keeper_failure().is_some()));
    }
    let mut waiting = page.family(
        "vflash_pool_waiting_requests",
        MetricKind::Gauge,
        "Requests of thin volumes that wait until the pool has space.",
    );
    for pool in pools {
        waiting.sample(&[("pool", &pool.name)], pool.waiting());
    }
    let mut scrubbed = page.family(
        "vflash_pool_scrubbed_bytes_total",
        MetricKind::Counter,
        "Freed space that was zeroed since the daemon started.",
    );
    for (name, _, scrub) in &facts {
        scrubbed.sample(&[("pool", name)], scrub.scrubbed_bytes);
    }
    let mut failing = page.family(
        "vflash_pool_scrub_failing",
        MetricKind::Gauge,
        "1 if the last attempt to zero freed space failed.",
    );
    for (name, _, scrub) in &facts {
        failing.sample(&[("pool", name)], u8::from(scrub.failure.is_some()));
    }
}

fn write_served(page: &mut Exposition, volumes: &[Served]) {
    let labels: Vec<_> = volumes
        .iter()
        .map(|volume| {
            let (vm, name) = volume.name.split_once('/').unwrap_or(("", &volume.name));
            [("pool", volume.pool.name.as_str()), ("vm", vm), ("volume", name)]
        })
        .collect();
    let each = || labels.iter().zip(volumes);
    type Sample = fn(&Served) -> u64;
    let gauges: [(&str, &str, Sample); 7] = [
        ("vflash_volume_size_bytes", "Size.", |volume| {
            volume.facts().map_or(0, |facts| facts.size_bytes)
        }),
        ("vflash_volume_mapped_bytes", "Bytes of the device that it holds.", |volume| {
            volume.facts().map_or(0, |facts| facts.mapped_bytes)
        }),
        ("vflash_volume_served", "1 if its socket is open.", |volume| {
            u64::from(volume.is_served())
        }),
        ("vflash_volume_fenced", "1 if it failed by a defect and its requests fail.", |volume| {
            u64::from(volume.is_fenced())
        }),
        (
            "vflash_volume_waiting_requests",
            "Requests that wait, for space most of all.",
            |volume| volume.waiting().map_or(0, |waiting| waiting.requests),
        ),
        ("vflash_volume_oldest_waiting_milliseconds", "Age of the oldest of them.", |volume| {
            volume.waiting().map_or(0, |waiting| waiting.oldest_ms)
        }),
        ("vflash_volume_attached", "1 if a front end is connected.", |volume| {
            u64::from(volume.link.is_attached())
        }),
    ];
    for (name, help, value) in gauges {
        let mut family = page.family(name, MetricKind::Gauge, help);
        for (labels, volume) in each() {
            family.sample(labels, value(volume));
        }
    }
    for (name, help, counter) in COUNTERS {
        let mut family = page.family(name, MetricKind::Counter, help);
        for (labels, volume) in each() {
            family.sample(labels, counter(&volume.counters).load(Ordering::Relaxed));
        }
    }
    let snapshots: Vec<_> = volumes.iter().map(|volume| volume.metrics.snapshot()).collect();
    let series: Vec<_> = labels
        .iter()
        .zip(&snapshots)
        .map(|(labels, snapshot)| VolumeSeries { labels, snapshot })
        .collect();
    write_volumes(page, &series);
}

type CacheGauge = (&'static str, &'static str, fn(&CacheGauges) -> u64);

/// What a cached disk shows of its state.
const CACHE_GAUGES: [CacheGauge; 20] = [
    ("vflash_cache_dirty_bytes", "Bytes of log that the backing lacks.", |g| g.dirty_bytes),
    ("vflash_cache_oldest_dirty_milliseconds", "Age of the oldest of them.", |g| {
        g.oldest_dirty.as_millis() as u64
    }),
    (
        "vflash_cache_log_fill_permille",
        "Thousandths of the log that hold what the backing lacks.",
        CacheGauges::log_fill_permille,
    ),
    ("vflash_cache_head_won", "Write-order number of the newest committed write.", |g| g.head_won),
    ("vflash_cache_drained_won", "Write-order number that the backing is at.", |g| g.drained_won),
    ("vflash_cache_epoch", "FLUSH boundaries of the guest.", |g| g.epoch),
    ("vflash_cache_drain_rate_bytes", "Bytes of log drained a second.", |g| g.drain_rate),
    (
        "vflash_cache_drain_eta_milliseconds",
        "Until all is drained, at that rate; 0: unknown.",
        |g| g.drain_eta.map_or(0, |eta| eta.as_millis() as u64),
    ),
    ("vflash_cache_index_bytes", "Memory of the index.", |g| g.index_bytes),
    ("vflash_cache_index_pieces", "Pieces in the index.", |g| g.index_pieces),
    ("vflash_cache_clean_bytes", "Single blocks on flash that the backing has too.", |g| {
        g.clean_bytes
    }),
    ("vflash_cache_probation_bytes", "Blocks in memory that were read once.", |g| {
        g.probation_bytes
    }),
    (
        "vflash_cache_backing_faster",
        "1 while nothing that is read is kept, since the backing reads faster than the flash.",
        |g| u64::from(g.backing_faster),
    ),
    (
        "vflash_cache_budget_used_up",
        "1 while nothing that is read is kept, since the write budget is used up.",
        |g| u64::from(g.budget_used_up),
    ),
    ("vflash_cache_policy_bytes", "Memory that knows what is worth keeping.", |g| g.policy_bytes),
    ("vflash_cache_waiting_requests", "Requests that wait for space in the log.", |g| g.parked),
    ("vflash_cache_size_bytes", "Of the pool, journal and clean data.", |g| g.size_bytes),
    (
        "vflash_cache_curve_hits_per_million",
        "Of a million reads, the hits that the curve has for the present size.",
        |g| g.curve_hits[0],
    ),
    (
        "vflash_cache_curve_hits_doubled_per_million",
        "The same for a cache of twice the size.",
        |g| g.curve_hits[1],
    ),
    (
        "vflash_cache_backing_away",
        "1 while the backing fails and writes go to the flash alone.",
        |g| u64::from(g.state == CacheState::WaitingForBacking),
    ),
];

fn write_cached(page: &mut Exposition, volumes: &[Served]) {
    let opened: Vec<_> = volumes
        .iter()
        .filter(|volume| volume.home.is_none())
        .filter_map(|volume| {
            let (vm, name) = volume.name.split_once('/').unwrap_or(("", &volume.name));
            let status = volume.cached.as_ref()?.status.clone();
            volume.look();
            let labels = [("pool", volume.pool.name.as_str()), ("vm", vm), ("volume", name)];
            Some((labels, status.gauges(), status))
        })
        .collect();
    for (name, help, value) in CACHE_GAUGES {
        let mut family = page.family(name, MetricKind::Gauge, help);
        for (labels, gauges, _) in &opened {
            family.sample(labels, value(gauges));
        }
    }
    let (name, help) = ("vflash_cache_info", "Mode and state of a cached disk; always 1.");
    let mut family = page.family(name, MetricKind::Gauge, help);
    for ([pool, vm, volume], gauges, _) in &opened {
        let state = super::caching::state(&gauges.state).to_string();
        let mode = gauges.mode.name();
        family.sample(&[*pool, *vm, *volume, ("mode", mode), ("state", &state)], 1);
    }
    for (name, help, counter) in CACHE_COUNTERS {
        let mut family = page.family(name, MetricKind::Counter, help);
        for (labels, _, status) in &opened {
            family.sample(labels, counter(&status.counters).load(Ordering::Relaxed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_of_a_volume_is_shown_once() {
        let counters = VolumeCounters::default();
        // The pattern names every field, so that a new one cannot be forgotten here.
        let VolumeCounters {
            bounced,
            merged,
            zeros_written,
            extents_mapped,
            extents_unmapped,
            // Gauges.
            waiting: _,
            waiting_since: _,
            last_drive_error: _,
        } = &counters;
        let all = [bounced, merged, zeros_written, extents_mapped, extents_unmapped];
        (1..).zip(all).for_each(|(value, counter)| counter.store(value, Ordering::Relaxed));
        let mut shown = COUNTERS.map(|(_, _, counter)| counter(&counters).load(Ordering::Relaxed));
        shown.sort_unstable();
        assert_eq!(shown, [1, 2, 3, 4, 5]);
    }
}
