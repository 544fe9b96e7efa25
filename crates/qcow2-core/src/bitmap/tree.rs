//! A bit set as a tree of 64-way nodes. Ranges that are all clear or all set take no memory.
//!
//! Invariant: a bit that was set stays set, even if memory runs out. Bits past the count may be set and have
//! no meaning.
//!
//! A node covers one range of bits. An empty slot has no bit set; the first mark fills it, once. A leaf has
//! 64 words, an inner node 64 slots for nodes of the level below. Setting a bit takes no lock: it walks down
//! with loads only, and changes one word of a leaf if the bit is not set yet. If the memory limit does not
//! allow a new node, the whole range of its slot is set: a bitmap may then have extra marks, never missing
//! ones.

use super::room::{MAX_BITS_MEMORY, Room};
use crate::sync::OnceLock;
use crate::sync::atomic::{AtomicU64, Ordering};
use ::alloc::boxed::Box;
use core::array;
use core::mem::size_of;

/// Words of a leaf, and slots of an inner node.
pub(super) const FAN_OUT: usize = 64;
/// Bits of a leaf.
pub(super) const LEAF_BITS: u64 = FAN_OUT as u64 * 64;
/// Allocator overhead per allocation, in bytes: an estimate.
const OVERHEAD: u64 = 16;

/// The words of a leaf, lowest bits first.
pub(super) type Words = [u64; FAN_OUT];

/// A set of bits.
#[derive(Debug)]
pub(super) struct Tree {
    root: Slot,
    /// Levels of the root above the leaves.
    level: u32,
    count: u64,
    room: Room,
    /// Bytes taken from `room`.
    taken: AtomicU64,
}

type Slot = OnceLock<Node>;

#[derive(Debug)]
enum Node {
    /// All bits are set.
    Ones,
    Inner(Box<[Slot; FAN_OUT]>),
    Leaf(Box<[AtomicU64; FAN_OUT]>),
}

/// Position of a node: it covers `span(level)` bits from `base` on.
#[derive(Clone, Copy)]
struct Place {
    level: u32,
    base: u64,
}

/// Bits that a node `level` levels above the leaves covers.
fn span(level: u32) -> u64 {
    1 << span_bits(level)
}

fn span_bits(level: u32) -> u32 {
    LEAF_BITS.trailing_zeros() + FAN_OUT.trailing_zeros() * level
}

impl Place {
    fn end(self) -> u64 {
        self.base + span(self.level)
    }

    /// Index of the slot that covers `bit`; the first or last one for a bit outside the node.
    fn index_of(self, bit: u64) -> usize {
        debug_assert!(self.level > 0, "a leaf has no nodes below");
        let index = bit.saturating_sub(self.base) >> span_bits(self.level - 1);
        index.min(FAN_OUT as u64 - 1) as usize
    }

    fn child(self, index: usize) -> Self {
        let level = self.level - 1;
        Self { level, base: self.base + span(level) * index as u64 }
    }
}

impl Node {
    fn leaf(words: impl Fn(usize) -> u64) -> Self {
        Self::Leaf(Box::new(array::from_fn(|index| AtomicU64::new(words(index)))))
    }

    /// Bytes of memory of this node, without its slot.
    fn bytes(&self) -> u64 {
        match self {
            Self::Ones => 0,
            Self::Inner(_) => inner_bytes(),
            Self::Leaf(_) => LEAF_BYTES,
        }
    }

    /// Bytes of memory of this node and all below it.
    fn all_bytes(&self) -> u64 {
        match self {
            Self::Inner(nodes) => {
                nodes.iter().filter_map(|slot| slot.get()).map(Self::all_bytes).sum::<u64>() + self.bytes()
            }
            _ => self.bytes(),
        }
    }

    /// A copy of the node, and the bytes of memory that it takes.
    fn copy(&self) -> (Self, u64) {
        let mut below = 0;
        let copied = match self {
            Self::Ones => Self::Ones,
            Self::Leaf(words) => Self::leaf(|index| words[index].load(Ordering::Relaxed)),
            Self::Inner(nodes) => Self::Inner(Box::new(array::from_fn(|index| match nodes[index].get() {
                None => Slot::new(),
                Some(node) => {
                    let (node, bytes) = node.copy();
                    below += bytes;
                    Slot::from(node)
                }
            }))),
        };
        let bytes = copied.bytes();
        (copied, bytes + below)
    }

    /// The node with all its bits set, in a form in which single bits can be cleared.
    fn filled(mut self) -> Self {
        match &mut self {
            Self::Ones => {}
            Self::Leaf(words) => words.iter_mut().for_each(|word| *word.get_mut() = u64::MAX),
            Self::Inner(nodes) => nodes.iter_mut().for_each(|slot| *slot = Slot::from(Self::Ones)),
        }
        self
    }
}

const LEAF_BYTES: u64 = LEAF_BITS / 8 + OVERHEAD;

const fn inner_bytes() -> u64 {
    (size_of::<Slot>() * FAN_OUT) as u64 + OVERHEAD
}

impl Tree {
    /// `count` bits, at most 2^32, all clear. Memory is taken from `room`.
    pub(super) fn new(count: u64, room: &Room) -> Self {
        Self {
            root: Slot::new(),
            level: level_for(count),
            count,
            room: room.clone(),
            taken: AtomicU64::new(0),
        }
    }

    /// How many bits there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    fn root_place(&self) -> Place {
        Place { level: self.level, base: 0 }
    }

    pub(super) fn is_set(&self, bit: u64) -> bool {
        let (mut slot, mut place) = (&self.root, self.root_place());
        loop {
            match slot.get() {
                _ if bit >= self.count => return false,
                None => return false,
                Some(Node::Ones) => return true,
                Some(Node::Leaf(words)) => {
                    let bit = bit - place.base;
                    return words[(bit / 64) as usize].load(Ordering::Relaxed) >> (bit % 64) & 1 == 1;
                }
                Some(Node::Inner(nodes)) => {
                    let index = place.index_of(bit);
                    (slot, place) = (&nodes[index], place.child(index));
                }
            }
        }
    }

    /// The first set bit from `from` on, or with `set` false the first clear one.
    pub(super) fn next(&self, from: u64, set: bool) -> Option<u64> {
        next(&self.root, self.root_place(), from, set).filter(|&bit| bit < self.count)
    }

    /// Sets the bits from `first` to `last`, both included and below the count. Returns false if memory ran
    /// out and other bits were set too.
    pub(super) fn set(&self, first: u64, last: u64) -> bool {
        debug_assert!(first <= last && last < self.count, "bits {first} to {last} of {}", self.count);
        self.set_below(&self.root, self.root_place(), first, last)
    }

    fn set_below(&self, slot: &Slot, place: Place, first: u64, last: u64) -> bool {
        let whole = first <= place.base && last >= place.end().min(self.count) - 1;
        let (node, exact) = self.filled(slot, place, whole);
        match node {
            Node::Ones => exact,
            Node::Inner(nodes) => {
                let mut exact = true;
                for index in place.index_of(first)..=place.index_of(last) {
                    exact &= self.set_below(&nodes[index], place.child(index), first, last);
                }
                exact
            }
            Node::Leaf(words) => {
                let (first, last) =
                    (first.max(place.base) - place.base, last.min(place.end() - 1) - place.base);
                for index in first / 64..=last / 64 {
                    let low = if index == first / 64 { first % 64 } else { 0 };
                    let high = if index == last / 64 { last % 64 } else { 63 };
                    set_word(&words[index as usize], (u64::MAX >> (63 - high)) & (u64::MAX << low));
                }
                true
            }
        }
    }

    /// Sets the bits that are set in `words`, those of the leaf that starts at bit `base`. Returns false as
    /// [`set`](Self::set).
    pub(super) fn set_words(&self, base: u64, words: &Words) -> bool {
        let (mut slot, mut place) = (&self.root, self.root_place());
        loop {
            let (node, exact) = self.filled(slot, place, false);
            match node {
                Node::Ones => return exact,
                Node::Inner(nodes) => {
                    let index = place.index_of(base);
                    (slot, place) = (&nodes[index], place.child(index));
                }
                Node::Leaf(leaf) => {
                    leaf.iter().zip(words).for_each(|(word, mask)| set_word(word, *mask));
                    return true;
                }
            }
        }
    }

    /// The node in `slot`. Fills an empty slot: with `Ones` if all bits are `wanted` or if memory has run
    /// out, else with an empty node. Also returns false if bits were set that are not wanted.
    fn filled<'a>(&self, slot: &'a Slot, place: Place, wanted: bool) -> (&'a Node, bool) {
        let mut exact = true;
        if slot.get().is_none() {
            let node = if wanted { None } else { self.make(place.level) };
            exact = wanted || node.is_some();
            // Another thread may have filled the slot meanwhile; its node stays.
            if let Err(node) = slot.set(node.unwrap_or(Node::Ones)) {
                self.give(node.bytes());
                exact = true;
            }
        }
        (slot.get_or_init(|| Node::Ones), exact)
    }

    /// A node with all bits clear; `None` if memory has run out.
    fn make(&self, level: u32) -> Option<Node> {
        let bytes = if level == 0 { LEAF_BYTES } else { inner_bytes() };
        if !self.room.take(bytes) {
            return None;
        }
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Some(match level {
            0 => Node::leaf(|_| 0),
            _ => Node::Inner(Box::new(array::from_fn(|_| Slot::new()))),
        })
    }

    fn give(&self, bytes: u64) {
        self.room.give(bytes);
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Sets the bits that are set in `other`, which has the same count. Returns false as [`set`](Self::set).
    pub(super) fn merge(&self, other: &Self) -> bool {
        self.merge_below(&other.root, other.root_place())
    }

    fn merge_below(&self, slot: &Slot, place: Place) -> bool {
        match slot.get() {
            None => true,
            Some(_) if place.base >= self.count => true,
            Some(Node::Ones) => self.set(place.base, place.end().min(self.count) - 1),
            Some(Node::Leaf(words)) => {
                self.set_words(place.base, &array::from_fn(|index| words[index].load(Ordering::Relaxed)))
            }
            Some(Node::Inner(nodes)) => {
                let mut exact = true;
                for (index, slot) in nodes.iter().enumerate() {
                    exact &= self.merge_below(slot, place.child(index));
                }
                exact
            }
        }
    }

    /// The words of the leaf that starts at bit `base`; bits past the count are clear.
    pub(super) fn words(&self, base: u64) -> Words {
        debug_assert!(base.is_multiple_of(LEAF_BITS), "words from bit {base} on");
        let (mut slot, mut place) = (&self.root, self.root_place());
        let mut words = loop {
            match slot.get() {
                _ if base >= self.count => break [0; FAN_OUT],
                None => break [0; FAN_OUT],
                Some(Node::Ones) => break [u64::MAX; FAN_OUT],
                Some(Node::Leaf(words)) => {
                    break array::from_fn(|index| words[index].load(Ordering::Relaxed));
                }
                Some(Node::Inner(nodes)) => {
                    let index = place.index_of(base);
                    (slot, place) = (&nodes[index], place.child(index));
                }
            }
        };
        for (index, word) in (0u64..).zip(&mut words) {
            *word &= below(self.count.saturating_sub(base + index * 64));
        }
        words
    }

    /// The same bits with another count. New bits are clear, unless memory has run out.
    pub(super) fn resized(mut self, count: u64) -> Self {
        let mut root = core::mem::take(&mut self.root);
        self.cut(&mut root, self.root_place(), self.count.min(count));
        let level = level_for(count);
        for _ in level..self.level {
            // `cut` has left bits in the first slot only.
            root = match root.take() {
                Some(Node::Inner(nodes)) => {
                    self.give(inner_bytes());
                    let [first, ..] = *nodes;
                    first
                }
                Some(node) => Slot::from(node),
                None => root,
            };
        }
        for level in self.level..level {
            let Some(node) = root.take() else { break };
            root = match self.make(level + 1) {
                Some(Node::Inner(mut nodes)) => {
                    nodes[0] = Slot::from(node);
                    Slot::from(Node::Inner(nodes))
                }
                _ => {
                    self.give(node.all_bytes());
                    Slot::from(Node::Ones)
                }
            };
        }
        (self.root, self.level, self.count) = (root, level, count);
        self
    }

    /// Clears the bits from `count` on, unless the nodes for that exceed the memory limit.
    fn cut(&self, slot: &mut Slot, place: Place, count: u64) {
        if place.end() <= count {
            return;
        }
        if place.base >= count {
            if let Some(node) = slot.take() {
                self.give(node.all_bytes());
            }
            return;
        }
        if let Some(Node::Ones) = slot.get()
            && let Some(node) = self.make(place.level)
        {
            *slot = Slot::from(node.filled());
        }
        match slot.get_mut() {
            None | Some(Node::Ones) => {}
            Some(Node::Inner(nodes)) => {
                let first = place.index_of(count);
                (first..FAN_OUT).for_each(|index| self.cut(&mut nodes[index], place.child(index), count));
            }
            Some(Node::Leaf(words)) => {
                for (index, word) in (0u64..).zip(words.iter_mut()) {
                    *word.get_mut() &= below(count.saturating_sub(place.base + index * 64));
                }
            }
        }
    }
}

impl Clone for Tree {
    /// A copy with a memory limit of its own.
    fn clone(&self) -> Self {
        let (root, bytes) = match self.root.get().map(Node::copy) {
            Some((node, bytes)) => (Slot::from(node), bytes),
            None => (Slot::new(), 0),
        };
        let room = Room::new(MAX_BITS_MEMORY.saturating_sub(bytes));
        Self { root, level: self.level, count: self.count, room, taken: AtomicU64::new(bytes) }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.room.give(self.taken.load(Ordering::Relaxed));
    }
}

/// The level of the smallest node that covers `count` bits.
fn level_for(count: u64) -> u32 {
    let mut level = 0;
    while span(level) < count {
        level += 1;
    }
    level
}

/// A word with the lowest `count` bits set.
fn below(count: u64) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

fn set_word(word: &AtomicU64, mask: u64) {
    if word.load(Ordering::Relaxed) & mask != mask {
        word.fetch_or(mask, Ordering::Relaxed);
    }
}

/// The first set bit of a node from `from` on, or with `set` false the first clear one.
fn next(slot: &Slot, place: Place, from: u64, set: bool) -> Option<u64> {
    let from = from.max(place.base);
    match slot.get() {
        _ if from >= place.end() => None,
        None => (!set).then_some(from),
        Some(Node::Ones) => set.then_some(from),
        Some(Node::Inner(nodes)) => (place.index_of(from)..FAN_OUT)
            .find_map(|index| next(&nodes[index], place.child(index), from, set)),
        Some(Node::Leaf(words)) => {
            let start = from - place.base;
            (start / 64..FAN_OUT as u64).find_map(|index| {
                let word = words[index as usize].load(Ordering::Relaxed);
                let looked_at = if index == start / 64 { u64::MAX << (start % 64) } else { u64::MAX };
                let word = if set { word } else { !word } & looked_at;
                (word != 0).then(|| place.base + index * 64 + u64::from(word.trailing_zeros()))
            })
        }
    }
}

#[cfg(test)]
mod tests;
