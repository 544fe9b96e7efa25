use super::*;
use ::alloc::vec;
use ::alloc::vec::Vec;
use ::std::collections::BTreeSet;
use proptest::prelude::*;

/// Enough for several levels, few enough to check each bit.
const COUNT: u64 = 3 * 64 * LEAF_BITS + 777;

fn runs(tree: &Tree) -> Vec<(u64, u64)> {
    let mut at = 0;
    core::iter::from_fn(|| {
        let first = tree.next(at, true)?;
        at = tree.next(first, false).unwrap_or(tree.count());
        Some((first, at - 1))
    })
    .collect()
}

/// The runs that these marks give, sorted and joined.
fn model(marks: &[(u64, u64)], count: u64) -> Vec<(u64, u64)> {
    let mut set = vec![false; count as usize];
    for &(first, last) in marks {
        set[first.min(count) as usize..(last + 1).min(count) as usize].fill(true);
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (bit, _) in (0u64..).zip(&set).filter(|(_, set)| **set) {
        match runs.last_mut() {
            Some(run) if run.1 + 1 == bit => run.1 = bit,
            _ => runs.push((bit, bit)),
        }
    }
    runs
}

fn filled(marks: &[(u64, u64)], count: u64, room: &Room) -> Tree {
    let tree = Tree::new(count, room);
    marks.iter().for_each(|&(first, last)| assert!(tree.set(first, last.min(count - 1))));
    tree
}

/// Ranges from single bits to all bits, some of which start or end with a node.
fn marks() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let place = prop_oneof![
        0..COUNT,
        (0..COUNT / LEAF_BITS).prop_map(|leaf| leaf * LEAF_BITS),
        (0..3u64).prop_map(|node| node * 64 * LEAF_BITS),
    ];
    let len = prop_oneof![1..200u64, Just(LEAF_BITS), Just(64 * LEAF_BITS), Just(COUNT)];
    proptest::collection::vec((place, len).prop_map(|(at, len)| (at, (at + len).min(COUNT) - 1)), 0..8)
}

/// Checks that all memory was given back.
#[track_caller]
fn check_room(room: Room) {
    assert_eq!(room.left.load(Ordering::Relaxed), MAX_BITS_MEMORY);
}

proptest! {
    #[test]
    fn a_tree_behaves_like_a_bool_per_bit(a in marks(), b in marks(), count in 1..COUNT) {
        let room = Room::default();
        let tree = filled(&a, COUNT, &room);
        prop_assert_eq!(runs(&tree), model(&a, COUNT));
        let taken = tree.taken.load(Ordering::Relaxed);
        prop_assert_eq!(taken, tree.root.get().map_or(0, Node::all_bytes));
        prop_assert_eq!(runs(&tree.clone()), runs(&tree));
        let copy = Tree::new(COUNT, &room);
        for base in (0..COUNT).step_by(LEAF_BITS as usize) {
            prop_assert!(copy.set_words(base, &tree.words(base)));
        }
        prop_assert_eq!(runs(&copy), runs(&tree));
        let both = filled(&b, COUNT, &room);
        prop_assert!(both.merge(&tree));
        prop_assert_eq!(runs(&both), model(&[&a[..], &b[..]].concat(), COUNT));
        // Shorter, and longer again: bits that were cut off do not come back.
        let cut = tree.resized(count);
        prop_assert_eq!(runs(&cut), model(&a, count));
        prop_assert_eq!(cut.taken.load(Ordering::Relaxed), cut.root.get().map_or(0, Node::all_bytes));
        let again = cut.resized(100 * COUNT);
        prop_assert_eq!(runs(&again), model(&a, count));
        prop_assert!(again.set(99 * COUNT, 99 * COUNT));
        prop_assert!(again.is_set(99 * COUNT) && !again.is_set(98 * COUNT));
        drop((copy, both, again));
        check_room(room);
    }

    /// If memory runs out, no bit is lost, and the return value tells about extra bits.
    #[test]
    fn past_the_memory_limit_extra_bits_are_set_and_none_is_lost(
        a in marks(), b in marks(), bytes in 0..40_000u64, count in 1..COUNT,
    ) {
        let room = Room::new(bytes);
        let tree = Tree::new(COUNT, &room);
        let exact = a.iter().fold(true, |exact, &(first, last)| tree.set(first, last) && exact);
        let other = filled(&b, COUNT, &Room::default());
        let merged = tree.merge(&other);
        let wanted = model(&[&a[..], &b[..]].concat(), COUNT);
        for &(first, last) in &wanted {
            prop_assert!(tree.next(first, false).is_none_or(|clear| clear > last));
        }
        if exact && merged {
            prop_assert_eq!(runs(&tree), wanted);
        }
        prop_assert!(tree.taken.load(Ordering::Relaxed) <= bytes);
        let cut = tree.resized(count).resized(2 * COUNT);
        for &(first, last) in &model(&[&a[..], &b[..]].concat(), count) {
            prop_assert!(cut.next(first, false).is_none_or(|clear| clear > last));
        }
        drop(cut);
        prop_assert_eq!(room.left.load(Ordering::Relaxed), bytes);
    }
}

/// Ranges that are a bit longer or shorter than a node or than the whole tree.
#[test]
fn ranges_around_node_boundaries_are_exact() {
    for (base, end) in [
        (0, LEAF_BITS),
        (LEAF_BITS, 2 * LEAF_BITS),
        (0, 64 * LEAF_BITS),
        (64 * LEAF_BITS, 128 * LEAF_BITS),
        (3 * 64 * LEAF_BITS, COUNT),
        (0, COUNT),
    ] {
        for first in base.saturating_sub(1)..base + 2 {
            for last in end - 3..(end + 1).min(COUNT) {
                let tree = filled(&[(first, last)], COUNT, &Room::default());
                assert_eq!(runs(&tree), [(first, last)]);
                let inside: Vec<_> =
                    (0..COUNT).step_by(LEAF_BITS as usize).map(|base| tree.words(base)).collect();
                let count: u32 = inside.iter().flatten().map(|word| word.count_ones()).sum();
                assert_eq!(u64::from(count), last - first + 1);
            }
        }
    }
}

/// The largest tree, and the memory that it takes.
#[test]
fn memory_grows_with_mixed_ranges_only() {
    let (count, room) = (1 << 32, Room::default());
    let tree = Tree::new(count, &room);
    let taken = || tree.taken.load(Ordering::Relaxed);
    assert_eq!((taken(), runs(&tree)), (0, vec![]));
    assert!(tree.set(0, 0) && tree.set(count - 1, count - 1));
    assert!(taken() < 20 << 10, "{}", taken());
    assert!(tree.set(1 << 20, (1 << 31) - 1));
    assert!(taken() < 40 << 10, "{}", taken());
    assert_eq!(runs(&tree), [(0, 0), (1 << 20, (1 << 31) - 1), (count - 1, count - 1)]);
    let all = filled(&[(0, count - 1)], count, &room);
    assert_eq!((all.taken.load(Ordering::Relaxed), runs(&all)), (0, vec![(0, count - 1)]));
    let less = all.resized(count - 1).resized(count);
    assert_eq!(runs(&less), [(0, count - 2)]);
    assert!(less.taken.load(Ordering::Relaxed) < 20 << 10);
    drop((tree, less));
    check_room(room);
}

/// Threads that fill the same slot at the same time lose no mark.
#[test]
fn concurrent_first_marks_lose_nothing() {
    for round in 0..20u64 {
        let room = Room::default();
        let tree = Tree::new(COUNT, &room);
        let bits = |thread: u64| (0..3000u64).map(move |i| (i * 7919 + thread * 13 + round) * 31 % COUNT);
        ::std::thread::scope(|scope| {
            for thread in 0..4 {
                let tree = &tree;
                scope.spawn(move || bits(thread).for_each(|bit| assert!(tree.set(bit, bit))));
            }
        });
        let wanted: BTreeSet<u64> = (0..4).flat_map(bits).collect();
        let found: BTreeSet<u64> = runs(&tree).into_iter().flat_map(|(first, last)| first..=last).collect();
        assert!(found == wanted, "round {round}");
        assert_eq!(tree.taken.load(Ordering::Relaxed), tree.root.get().map_or(0, Node::all_bytes));
        drop(tree);
        check_room(room);
    }
}
