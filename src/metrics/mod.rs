//! L1: what is counted, and how Prometheus reads it.

mod histogram;
mod prometheus;
mod volume;

pub use histogram::{Histogram, HistogramSnapshot};
pub use prometheus::{Exposition, Family, MetricKind, VolumeSeries, write_volumes};
pub use volume::{ClassSnapshot, OperationClass, VolumeMetrics, VolumeSnapshot};
