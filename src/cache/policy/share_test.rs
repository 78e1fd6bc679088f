//! Minimum, maximum and weight, against random owners.

use super::*;

fn share(min: u64, max: u64, weight: u32) -> Share {
    Share { min, max, weight }
}

/// Claims a block as a cache does, evicting where it is told to; whether it got one.
fn take(space: &mut Space, id: OwnerId) -> bool {
    for _ in 0..3 {
        match space.claim(id) {
            Claim::Free => return true,
            Claim::From(giver) => space.release(giver),
            Claim::None => return false,
        }
    }
    panic!("an eviction makes room");
}

#[test]
fn one_alone_has_all_and_gives_way_by_weight() {
    let mut space = Space::new(1000);
    let one = space.add(share(100, 1000, 1)).unwrap();
    let two = space.add(share(100, 1000, 3)).unwrap();
    (0..5000).for_each(|_| assert!(take(&mut space, one)));
    assert_eq!((space.used(one), space.free()), (1000, 0), "what nobody wants is his");
    for _ in 0..5000 {
        take(&mut space, two);
        take(&mut space, one);
    }
    assert_eq!(space.entitlement(two), 700);
    assert!(space.used(two).abs_diff(700) <= 2, "{} and {}", space.used(one), space.used(two));
}

#[test]
fn minimum_and_maximum_are_held_against_a_greedy_neighbour() {
    let mut space = Space::new(1000);
    let quiet = space.add(share(300, 400, 1)).unwrap();
    let greedy = space.add(share(0, 800, 100)).unwrap();
    (0..2000).for_each(|_| assert!(take(&mut space, quiet)));
    assert_eq!(space.used(quiet), 400, "his maximum, though more is free");
    (0..5000).for_each(|_| assert!(take(&mut space, greedy)));
    assert!(space.used(quiet) >= 300, "{}", space.used(quiet));
    assert_eq!(space.free(), 0);
    assert!(space.used(greedy) <= 700);
}

#[test]
fn a_minimum_that_was_lent_is_given_back() {
    let mut space = Space::new(100);
    let lender = space.add(share(60, 100, 1)).unwrap();
    let borrower = space.add(share(0, 100, 1000)).unwrap();
    (0..100).for_each(|_| assert!(take(&mut space, borrower)));
    (0..60).for_each(|_| assert!(take(&mut space, lender)));
    assert!(space.used(lender) >= 60, "{}", space.used(lender));
}

#[test]
fn nobody_is_pushed_below_his_minimum_by_targets_that_are_too_high() {
    let mut space = Space::new(1000);
    let small = space.add(share(300, 1000, 1)).unwrap();
    let large = space.add(share(0, 1000, 1)).unwrap();
    space.set_target(small, Some(300));
    space.set_target(large, Some(1000));
    (0..300).for_each(|_| assert!(take(&mut space, small)));
    (0..2000).for_each(|_| assert!(take(&mut space, large)));
    assert_eq!((space.used(small), space.used(large)), (300, 700));
}

#[test]
fn what_cannot_be_promised_is_refused_and_named() {
    let mut space = Space::new(100);
    let one = space.add(share(80, 100, 1)).unwrap();
    let error = space.add(share(30, 100, 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.to_string().contains("20 of 100"), "{error}");
    assert_eq!(space.add(share(3, 2, 1)).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(space.add(share(0, 2, 0)).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(space.resize(79).unwrap_err().kind(), ErrorKind::Full);
    space.set_share(one, share(90, 100, 1)).unwrap();
    space.remove(one);
    space.add(share(100, 100, 1)).unwrap();
}

#[test]
fn random_owners_never_exceed_the_space_nor_fall_below_what_is_reserved() {
    for seed in 0..50 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut space = Space::new(600);
        let mut owners: Vec<(OwnerId, Share)> = Vec::new();
        for _ in 0..4000 {
            match random.u8(..100) {
                0 => {
                    let min = random.u64(..200);
                    let share = share(min, min + random.u64(..400), random.u32(1..9));
                    if let Ok(id) = space.add(share) {
                        owners.push((id, share));
                    }
                }
                1 if owners.len() > 1 => {
                    let (id, _) = owners.swap_remove(random.usize(..owners.len()));
                    space.remove(id);
                }
                2 if space.resize(random.u64(300..700)).is_ok() => {
                    while let Some(id) = space.surplus() {
                        space.release(id);
                    }
                }
                _ if !owners.is_empty() => {
                    let (id, share) = owners[random.usize(..owners.len())];
                    let before: Vec<u64> = owners.iter().map(|(id, _)| space.used(*id)).collect();
                    let got = take(&mut space, id);
                    assert!(got || share.max == 0 || space.free() == 0, "seed {seed}");
                    for ((other, share), before) in owners.iter().zip(before) {
                        let used = space.used(*other);
                        assert!(used <= share.max, "seed {seed}");
                        assert!(used >= before.min(share.min), "seed {seed}: below the minimum");
                    }
                }
                _ => {}
            }
            let used: u64 = owners.iter().map(|(id, _)| space.used(*id)).sum();
            assert_eq!(used + space.free(), space.total(), "seed {seed}");
        }
    }
}
