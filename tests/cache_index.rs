//! The index costs at most 24 bytes a piece, all in, and so 0.6 % of a cache of 4 KiB writes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use vflash::cache::index::{BLOCK_SECTORS, Index, Piece};

/// Bytes that live allocations take, the allocator's own header and rounding included.
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

/// What glibc takes for an allocation: 8 bytes more, in steps of 16, at least 32.
fn taken(bytes: usize) -> usize {
    (bytes + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    /// # Safety
    /// As the trait demands.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    /// # Safety
    /// As the trait demands.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const PIECES: u64 = 1 << 20;

/// A 4 KiB write of block `block`, stored at `position`.
fn write(block: u64, position: u64) -> Piece {
    let start = block * BLOCK_SECTORS;
    Piece { start, count: 8, skip: 0, stored: 8, position, checksum: position as u32 }
}

#[test]
fn a_piece_of_4_kib_costs_at_most_24_bytes_all_in() {
    let before = LIVE.load(Ordering::Relaxed);
    let mut index = Index::new(usize::MAX);
    let mut random = fastrand::Rng::with_seed(1);
    // A disk of 4 TiB, written at random.
    let begun = Instant::now();
    for position in 0..PIECES {
        index.insert(write(random.u64(0..1 << 30), position * 8));
    }
    let insert = begun.elapsed();
    let measured = LIVE.load(Ordering::Relaxed) - before;
    let pieces = index.len() as f64;
    let each = measured as f64 / pieces;
    let share = each / 4096.0 * 100.0;
    let (mut random, mut found) = (fastrand::Rng::with_seed(1), Vec::with_capacity(8));
    let begun = Instant::now();
    for _ in 0..PIECES {
        found.clear();
        index.lookup(random.u64(0..1 << 30) * BLOCK_SECTORS, BLOCK_SECTORS, &mut found);
        assert_eq!(found.len(), 1);
    }
    let lookup = begun.elapsed();
    println!(
        "index: {pieces} pieces of 4 KiB in random order: {each:.1} bytes each, {share:.2} % of \
         the data; insert {} ns, lookup {} ns",
        insert.as_nanos() / u128::from(PIECES),
        lookup.as_nanos() / u128::from(PIECES)
    );
    assert!(each <= 24.0, "{each:.1} bytes a piece");
    assert!(share <= 0.6, "{share:.2} %");
    let told = index.memory_bytes() as f64 / measured as f64;
    assert!((0.9..1.2).contains(&told), "memory_bytes tells {told:.2} of what is taken");
    // Overwritten at random, and half of it forgotten: no creeping growth.
    for position in 0..PIECES / 2 {
        let block = random.u64(0..1 << 30);
        index.insert(write(block, position * 8));
        index.remove(block * BLOCK_SECTORS, BLOCK_SECTORS);
    }
    drop(index);
    assert!(LIVE.load(Ordering::Relaxed) < before + 4096, "all of it is given back");
}
