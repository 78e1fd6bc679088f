//! Planted bugs: the test of the tests. With the feature `planted` one of them is chosen at run
//! time by `VFLASH_PLANTED=name`, and the suite that is to find it must fail; `cargo xtask crash
//! --planted` holds every suite to that. Without the feature there is nothing of them in the build.

/// A mistake that somebody could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A write is acknowledged before it is durable.
    AckBeforeFlush,
    /// A guest's FLUSH does not wait for what is not durable yet.
    FlushSkipsWrites,
    /// The drain position moves before the backing has flushed.
    TailBeforeBackingFlush,
    /// A backing's failed flush is tried again, and what it should have covered is not written.
    FailedFlushRetried,
    /// The flash's failed flush is taken for one that succeeded.
    FlashFlushTrusted,
    /// What was drained before writes passed the log by is served after a restart.
    StaleAfterMode,
    /// Of overlapping writes in one group the older one wins.
    OverlapSwapped,
    /// A group goes to the backing before it is durable in the sidecar.
    GroupNotCommitted,
    /// Batches and segments are not told apart by salt and links.
    PreviousLapAccepted,
    /// Records count whatever salt they were sealed with.
    SaltIgnored,
    /// A replayed request that is in the log is appended again.
    ReplayedTwice,
    /// Requests of machines that share a disk are not told apart.
    DoorsAlike,
    /// Recovery checks headers and not the data.
    ChecksumOfHeaderOnly,
    /// A torn end of the log is taken for damage.
    TornTailIsCorruption,
    /// Damage within the log is taken for its end.
    CorruptionIsTail,
    /// A redo group is retired before it has been applied.
    RecoveryNotRestartable,
    /// Numbers of writes that a crash undid are given again.
    NumberReused,
    /// A discard is not recovered.
    DiscardForgotten,
    /// A piece that is overwritten in part shows the wrong half.
    WrongHalf,
    /// What was read from the backing is kept though it was written meanwhile.
    StaleClean,
    /// A block that is not drained is evicted.
    DirtyEvicted,
    /// Slot tables of another epoch count.
    OtherEpoch,
    /// A step of a consistency group is committed before every disk of it has prepared its group.
    CommittedUnprepared,
    /// A disk of a consistency group applies its group before the step is committed.
    AppliedUncommitted,
    /// A disk of a consistency group takes more into its redo group than was agreed on.
    BeyondAgreed,
    /// A request for which a group has too little room left is taken in part.
    RequestTorn,
    /// A disk has the numbers of its consistency group, and is drained by itself.
    GoneAlone,
    /// A disk of a consistency group is held, and the others go on.
    HoldOfOne,
    /// A disk leaves its consistency group before the others' stamps say so.
    LeftUnsaid,
    /// A disk that was given up still counts as one of its consistency group.
    NotExpelled,
    /// A disk of a consistency group offers numbers that are not durable in its log yet.
    FrontierAhead,
    /// The age of a flash is not compared with the backing's in a consistency group.
    OldFlashTrusted,
    /// A write of a write-through disk is answered when it is in the log.
    ThroughUndrained,
    /// A flush of the flash that ends late takes back what appends have made durable since.
    FlushTakesBack,
    /// A read now and then takes the backing's version of what is in the log.
    StaleRead,
    /// A cache that shrinks to where no header is left forgets how far the numbers have come.
    ShrinkForgetsNumbers,
    /// What is read is kept though the write budget is used up.
    BudgetIgnored,
    /// Nobody is told that a front end cut its guest's memory short.
    FaultUntold,
    /// A front end may have two regions of memory at one guest address.
    RegionsOverlap,
    /// RESET_DEVICE leaves the rings as they are.
    ResetForgotten,
    /// A backing is opened though its owner stamp says that another's flash has writes for it.
    StampUnchecked,
    /// What a killed owner left with an NBD server is not waited for.
    HoldLeftOut,
}

impl Bug {
    pub const ALL: [Self; 42] = [
        Self::AckBeforeFlush,
        Self::FlushSkipsWrites,
        Self::TailBeforeBackingFlush,
        Self::FailedFlushRetried,
        Self::FlashFlushTrusted,
        Self::StaleAfterMode,
        Self::OverlapSwapped,
        Self::GroupNotCommitted,
        Self::PreviousLapAccepted,
        Self::SaltIgnored,
        Self::ReplayedTwice,
        Self::DoorsAlike,
        Self::ChecksumOfHeaderOnly,
        Self::TornTailIsCorruption,
        Self::CorruptionIsTail,
        Self::RecoveryNotRestartable,
        Self::NumberReused,
        Self::DiscardForgotten,
        Self::WrongHalf,
        Self::StaleClean,
        Self::DirtyEvicted,
        Self::OtherEpoch,
        Self::CommittedUnprepared,
        Self::AppliedUncommitted,
        Self::BeyondAgreed,
        Self::RequestTorn,
        Self::GoneAlone,
        Self::HoldOfOne,
        Self::LeftUnsaid,
        Self::NotExpelled,
        Self::FrontierAhead,
        Self::OldFlashTrusted,
        Self::ThroughUndrained,
        Self::FlushTakesBack,
        Self::StaleRead,
        Self::ShrinkForgetsNumbers,
        Self::BudgetIgnored,
        Self::FaultUntold,
        Self::RegionsOverlap,
        Self::ResetForgotten,
        Self::StampUnchecked,
        Self::HoldLeftOut,
    ];
}

/// Whether this bug is to be made.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub fn planted(_bug: Bug) -> bool {
    false
}

/// Whether this bug is to be made.
#[cfg(feature = "planted")]
pub fn planted(bug: Bug) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<Bug>> = std::sync::OnceLock::new();
    let choose = || {
        let name = std::env::var("VFLASH_PLANTED").ok().filter(|name| !name.is_empty())?;
        let bug = Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name);
        Some(bug.unwrap_or_else(|| panic!("VFLASH_PLANTED={name}: there is no such bug")))
    };
    *CHOSEN.get_or_init(choose) == Some(bug)
}
