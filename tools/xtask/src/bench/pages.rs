//! What guest memory and fio's buffers are made of.

/// Huge pages of 2 MiB that the largest cell takes, with some to spare.
const HUGE_PAGES_MIN: u64 = 64;

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// A transfer of 128 KiB is one run of memory on huge pages, and 32 on small ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    Small,
    Huge,
}

impl Pages {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Small => "Guest memory and fio's buffers on pages of 4 KiB",
            Self::Huge => "Guest memory and fio's buffers on pages of 2 MiB",
        }
    }
}

/// Huge pages for as long as this lives, if the host has them or lets us reserve them.
pub(crate) struct HugePages {
    pub(crate) pages: Pages,
    /// What was reserved before.
    before: Option<u64>,
}

impl HugePages {
    pub(crate) fn reserve() -> Self {
        let mut before = None;
        if !enough() {
            let reserved = std::fs::read_to_string(RESERVED).ok();
            if let Some(count) = reserved.and_then(|text| text.trim().parse::<u64>().ok()) {
                // Only root may; without, small pages will do.
                let more = std::fs::write(RESERVED, (count + HUGE_PAGES_MIN).to_string());
                before = more.is_ok().then_some(count);
            }
        }
        Self { pages: if enough() { Pages::Huge } else { Pages::Small }, before }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(count) = self.before {
            // Pages still in use stay reserved; nothing more can be done about it here.
            let _ = std::fs::write(RESERVED, count.to_string());
        }
    }
}

fn enough() -> bool {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let number = |name| text.lines().find_map(|line: &str| line.strip_prefix(name));
    let number = |name| number(name).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let (free, kib): (Option<u64>, Option<u64>) =
        (number("HugePages_Free:"), number("Hugepagesize:"));
    matches!((free, kib), (Some(HUGE_PAGES_MIN..), Some(2048)))
}
