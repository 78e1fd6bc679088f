//! What more or less cache would bring: curves and advice.

use crate::arguments::{AdviseArguments, CurveArguments, Format};
use crate::client::{Client, volume_path};
use crate::output::{Table, print};
use vflash::cache::curve::{MissCurve, blocks_of, draw};
use vflash::control::api::{ErrorCode, Failure};
use vflash::control::api_cached::{Advice, AdviceMove, Curve, DiskAdvice};

type Result<T> = std::result::Result<T, Failure>;

/// `vflash mrc`
pub(crate) fn curve(client: &Client, format: Format, arguments: &CurveArguments) -> Result<()> {
    let name = &arguments.volume;
    let told: Curve = client.get(&format!("{}/curve", volume_path(name)?))?;
    let curve = drawn(&told)?;
    if let Some(path) = &arguments.svg {
        let picture = draw::svg(&curve, told.size_bytes, name);
        std::fs::write(path, picture).map_err(|error| {
            let text = format!("writing {}: {error}", path.display());
            Failure::new(ErrorCode::Io, text)
        })?;
    }
    print(format, &told, |told| match told.reads {
        0 => format!("{name} has not been read yet\n"),
        _ => draw::table(&curve, told.size_bytes),
    })
}

/// The curve behind the points.
fn drawn(told: &Curve) -> Result<MissCurve> {
    let ratio = |hits: u64| 1.0 - hits.min(1_000_000) as f64 / 1e6;
    let point = |point: &vflash::control::api_cached::CurvePoint| {
        (blocks_of(point.size_bytes), ratio(point.hits_per_million))
    };
    let points = told.points.iter().map(point).collect();
    MissCurve::from_points(points, told.reads as f64).ok_or_else(|| {
        let text = format!("the curve of {} is none: is vflash as new as vflashd?", told.name);
        Failure::new(ErrorCode::Internal, text)
    })
}

/// `vflash advise`
pub(crate) fn advise(client: &Client, format: Format, arguments: &AdviseArguments) -> Result<()> {
    let advice: Advice = client.get(&format!("/v1/advice?stepBytes={}", arguments.step.0))?;
    print(format, &advice, table)
}

fn table(advice: &Advice) -> String {
    let Advice { step_bytes, disks, best } = advice;
    let step = draw::size(*step_bytes);
    let (less, more) = (format!("{step} LESS"), format!("{step} MORE"));
    let mut table = Table::new(&["CACHED DISK", "POOL", "CACHE", "READS", "HITS", &less, &more]);
    for disk in disks {
        let DiskAdvice { hits_per_million: now, .. } = disk;
        let change = |then: u64| signed(then as i64 - *now as i64);
        table.row([
            disk.name.clone(),
            disk.pool.clone(),
            draw::size(disk.size_bytes),
            disk.reads.to_string(),
            percent(*now),
            change(disk.less_hits_per_million),
            change(disk.more_hits_per_million),
        ]);
    }
    let best = match best {
        None => "No move of that size brings more hits.\n".to_owned(),
        Some(AdviceMove { from, to, gain_per_million, .. }) => {
            let from = from.as_deref().unwrap_or("what is free");
            let gain = percent(*gain_per_million);
            format!("Best: {step} from {from} to {to}, {gain} more of all reads hit.\n")
        }
    };
    table.render() + &best
}

fn percent(per_million: u64) -> String {
    format!("{:.1} %", per_million as f64 / 1e4)
}

fn signed(per_million: i64) -> String {
    format!("{:+.1}", per_million as f64 / 1e4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_told_in_one_table_and_one_sentence() {
        let disk = |name: &str, less, now, more| DiskAdvice {
            name: name.to_owned(),
            pool: "p0".to_owned(),
            size_bytes: 4 << 30,
            reads: 1000,
            less_hits_per_million: less,
            hits_per_million: now,
            more_hits_per_million: more,
        };
        let best = AdviceMove {
            from: Some("a/scan".to_owned()),
            to: "a/db".to_owned(),
            bytes: 1 << 30,
            gain_per_million: 43_000,
        };
        let disks =
            vec![disk("a/db", 500_000, 610_000, 700_000), disk("a/scan", 9, 10_000, 10_000)];
        let mut advice = Advice { step_bytes: 1 << 30, disks, best: Some(best) };
        let text = "CACHED DISK  POOL  CACHE     READS  HITS    1.00 GiB LESS  1.00 GiB MORE\n\
                    a/db         p0    4.00 GiB  1000   61.0 %  -11.0          +9.0\n\
                    a/scan       p0    4.00 GiB  1000   1.0 %   -1.0           +0.0\n\
                    Best: 1.00 GiB from a/scan to a/db, 4.3 % more of all reads hit.\n";
        assert_eq!(table(&advice), text);
        advice.best = None;
        assert!(table(&advice).ends_with("No move of that size brings more hits.\n"));
    }
}
