//! Every refusal, word for word.

use super::*;
use crate::backing::format_test::stamp;
use crate::backing::identity::Kind;
use crate::base::units::MIB;

fn standing(stamp: Stamp) -> Standing {
    Standing {
        point: stamp.point,
        part: false,
        doubt: None,
        dropped: false,
        dirty_bytes: stamp.dirty_bytes,
        next_group: 10,
        live: None,
        findings: Vec::new(),
        stamp,
    }
}

fn clean() -> Stamp {
    Stamp { state: State::Clean, dirty_bytes: 0, oldest_dirty_ms: 0, ..stamp() }
}

/// A claim by the stamp's own owner, whose flash remembers all.
fn mine() -> Claim {
    let flash = Remembered { disk: [7; 16], owner_epoch: 5, point: 100, dirty: true };
    Claim {
        owner: stamp().owner,
        remembered: Some(flash),
        state: State::Dirty,
        drain: DrainMode::Grouped,
        create: false,
        adopt: false,
        group_bytes_max: None,
        new_disk: [9; 16],
        roster: stamp().roster,
        now_ms: 1_767_225_700_000,
    }
}

fn other(dirty: bool) -> Claim {
    let owner = Owner { allocation: [4; 16], host_name: "beta".into(), ..stamp().owner };
    let remembered = mine().remembered.filter(|_| dirty);
    Claim { owner, remembered, ..mine() }
}

fn flash(owner_epoch: u64, point: u64, dirty: bool) -> Option<Remembered> {
    Some(Remembered { disk: [7; 16], owner_epoch, point, dirty })
}

fn found() -> Identity {
    stamp().identity
}

fn judge(claim: &Claim, found: &Identity, standing: Option<&Standing>) -> Result<Verdict> {
    super::judge(claim, found, standing, "/mnt/disk.raw")
}

fn refusal(claim: &Claim, found: &Identity, stamp: Stamp) -> String {
    let error = judge(claim, found, Some(&standing(stamp))).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Fenced);
    error.to_string()
}

#[test]
fn the_owner_itself_goes_on() {
    let standing = standing(stamp());
    let verdict = judge(&mine(), &found(), Some(&standing)).expect("mine");
    assert!(!verdict.cold);
    let next = claimed(&mine(), verdict, found(), Some(&standing));
    assert_eq!((next.owner_epoch, next.first_epoch, next.sequence), (6, 4, 42));
    assert_eq!((next.state, next.dirty_bytes, next.retired_group), (State::Dirty, 12 * MIB, 9));
    // It died before its flash had noted the new epoch: still the same.
    let again = Standing { stamp: next, ..standing };
    let verdict = judge(&mine(), &found(), Some(&again)).expect("mine");
    assert!(!verdict.cold);
}

#[test]
fn another_owner_is_refused_while_dirty_data_exists_elsewhere() {
    assert_eq!(
        refusal(&other(false), &found(), stamp()),
        "it belongs to web-1/root on host alpha since 2025-12-31 23:59:59 UTC: at 2026-01-01 \
         00:00:00 UTC its flash held 12MiB that the backing lacks, the oldest of 2025-12-31 \
         23:59:50 UTC. Attach it there, or detach it there first. If that host or its flash is \
         gone for good, `vflash detach --lost --backing /mnt/disk.raw --confirm web-1/root` gives \
         these writes up: the disk is then at point 100 of 2025-12-31 23:59:58 UTC"
    );
    let ordered = Stamp { drain: DrainMode::Ordered, dirty_bytes: 0, ..stamp() };
    let text = refusal(&other(false), &found(), ordered);
    assert!(text.contains("may hold writes that the backing lacks (none at 2026-01-01"), "{text}");
    assert!(text.ends_with("UTC or later, as a disk that lost its power between two flushes"));
}

#[test]
fn a_clean_disk_may_be_taken_by_anybody_and_the_old_flash_is_out_of_date() {
    let before = standing(clean());
    let claim = Claim { remembered: None, ..other(false) };
    let verdict = judge(&claim, &found(), Some(&before)).expect("clean");
    assert!(!verdict.cold, "there is no old content");
    let taken = claimed(&claim, verdict, found(), Some(&before));
    assert_eq!((taken.owner_epoch, taken.first_epoch), (6, 6));
    assert_eq!(taken.owner.allocation, [4; 16]);
    // The first one comes back after the second is done.
    let done = Stamp { state: State::Clean, ..taken.clone() };
    let back = Claim { remembered: flash(5, 100, false), ..mine() };
    assert!(judge(&back, &found(), Some(&standing(done.clone()))).expect("clean").cold);
    let text = refusal(&mine(), &found(), done.clone());
    assert_eq!(
        text,
        "it was opened elsewhere (last by web-1/root on host beta, 2026-01-01 00:01:40 UTC) after \
         this flash had it: what the flash holds does not fit it any more and must be given up: \
         `vflash detach web-1/root --lost`"
    );
    // It claims, and dies before its flash has noted that it is cold.
    let cold = Verdict { cold: true };
    let mut again = claimed(&back, cold, found(), Some(&standing(done)));
    assert_eq!((again.owner_epoch, again.first_epoch), (7, 7));
    again.state = State::Clean;
    assert!(judge(&back, &found(), Some(&standing(again))).expect("clean").cold);
}

#[test]
fn a_backing_that_was_changed_is_refused_while_writes_wait_for_it() {
    let prefix = "it is not the backing that its owner stamp knows: ";
    let put_back = ". The flash holds writes for the other one: put that back";
    let or_adopt = "; or if it was moved or copied, say that it is the same disk: `vflash backing \
                    recover /mnt/disk.raw --adopt`";
    let file = "it is another file (inode number or time of birth)";
    for (change, what, adoptable) in [
        (Identity { size_bytes: 4 * MIB, ..found() }, "its size was 8MiB and is 4MiB", false),
        (
            Identity { block_bytes: 4096, ..found() },
            "its blocks had 512 bytes and have 4096",
            false,
        ),
        (Identity { kind: Kind::Device, ..found() }, "it was a file and is a block device", true),
        (Identity { fingerprint: [13, 12], ..found() }, file, true),
        (Identity { fingerprint: [11, 13], ..found() }, file, true),
    ] {
        let text = refusal(&mine(), &change, stamp());
        let remedy = if adoptable { or_adopt } else { "" };
        assert_eq!(text, format!("{prefix}{what}{put_back}{remedy}"));
        let adopt = Claim { adopt: true, ..mine() };
        let adopted = judge(&adopt, &change, Some(&standing(stamp())));
        assert_eq!(adopted.is_ok(), adoptable, "{what}");
        // With nothing to be written only the cache is out of date.
        let nothing = Claim { remembered: flash(5, 100, false), ..mine() };
        let verdict = judge(&nothing, &change, Some(&standing(clean()))).expect("clean");
        assert!(verdict.cold, "{what}");
        // Stamped, and dead before its flash has noted that it is cold: it still is.
        let before = standing(clean());
        let stamped = standing(claimed(&nothing, verdict, change, Some(&before)));
        assert!(judge(&nothing, &change, Some(&stamped)).expect("mine").cold, "{what}");
    }
    let unknown = Identity { fingerprint: [11, 0], ..found() };
    assert!(judge(&mine(), &unknown, Some(&standing(stamp()))).is_ok(), "what is unknown passes");
}

#[test]
fn a_backing_that_was_rolled_back_is_refused() {
    let end = "; put back what was there last, or give up what the flash holds: `vflash detach \
               web-1/root --lost`";
    let claim = Claim { remembered: flash(6, 100, true), ..mine() };
    assert_eq!(
        refusal(&claim, &found(), stamp()),
        format!(
            "it was rolled back: its stamp of 2026-01-01 00:00:00 UTC has owner epoch 5, and the \
             flash has seen 6{end}"
        )
    );
    let claim = Claim { remembered: flash(5, 101, true), ..mine() };
    assert_eq!(
        refusal(&claim, &found(), stamp()),
        format!("it was rolled back: it is at point 100, and the flash has seen it at 101{end}")
    );
    // A clean flash does not make a stamp legal that says dirty and is of the past.
    let claim = Claim { remembered: flash(6, 100, false), ..mine() };
    refusal(&claim, &found(), stamp());
    // All clean: it was put back as a whole.
    let restored = standing(clean());
    let verdict = judge(&claim, &found(), Some(&restored)).expect("clean");
    assert!(verdict.cold);
    assert_eq!(claimed(&claim, verdict, found(), Some(&restored)).owner_epoch, 7, "never again 6");
}

#[test]
fn another_disk_is_refused() {
    let remembered = Remembered { disk: [8; 16], owner_epoch: 5, point: 100, dirty: false };
    let claim = Claim { remembered: Some(remembered), ..mine() };
    assert_eq!(
        refusal(&claim, &found(), stamp()),
        "it is disk 07070707-0707-0707-0707-070707070707, and the flash holds disk \
         08080808-0808-0808-0808-080808080808: name the right backing and sidecar"
    );
}

#[test]
fn a_missing_stamp_is_made_only_with_leave_and_with_nothing_to_lose() {
    let error = judge(&mine(), &found(), None).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Fenced);
    assert_eq!(
        error.to_string(),
        "its sidecar is missing or empty, and the flash holds writes that only this backing may \
         get: restore the sidecar that belongs to it, or give up what the flash holds: `vflash \
         detach web-1/root --lost`"
    );
    let new = Claim { remembered: None, ..mine() };
    let error = judge(&new, &found(), None).expect_err("refused");
    assert_eq!(error.to_string(), "it has no owner stamp yet, and leave to make one was not given");
    let new = Claim { create: true, ..new };
    let verdict = judge(&new, &found(), None).expect("made");
    assert!(!verdict.cold);
    let made = claimed(&new, verdict, found(), None);
    assert_eq!((made.owner_epoch, made.first_epoch, made.sequence), (1, 1, 1));
    assert_eq!((made.disk, made.state, made.dirty_bytes), ([9; 16], State::Dirty, 0));
    assert_eq!(made.group_bytes_max, 2 * MIB);
    let lost = Claim { remembered: flash(5, 100, false), create: true, ..mine() };
    let verdict = judge(&lost, &found(), None).expect("made");
    assert!(verdict.cold);
    let made = claimed(&lost, verdict, found(), None);
    assert_eq!((made.owner_epoch, made.first_epoch, made.disk), (6, 6, [7; 16]));
}
