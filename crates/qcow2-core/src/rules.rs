//! Names for the ordering rules, so that a test can switch one off and check that the crash simulation
//! notices.

/// One rule about the order of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[cfg_attr(not(feature = "unstable-mutants"), allow(unreachable_pub, reason = "public for tests only"))]
pub enum OrderingRule {
    /// Refcounts and data are durable before the mapping entries that need them are written.
    RefcountsBeforeLinks,
    /// Mapping entries are durable when a flush returns.
    LinksBeforeFlushReturns,
    /// A refcount block is durable before the refcount table entry that points to it.
    BlockBeforeTableEntry,
    /// An unlink is durable before the cluster's refcount goes down.
    UnlinkBeforeFree,
    /// A new L2 table is zeroed (or copied) on disk before its L1 entry is written.
    TableBeforeEntry,
    /// A moved refcount table is durable before the header points to it.
    TableBeforeHeader,
    /// A snapshot's tables and refcounts are durable before the header points to them.
    SnapshotBeforeHeader,
    /// The copied flags of the active tables are cleared before a snapshot shares their clusters.
    CopiedClearedBeforeSnapshot,
    /// Bitmaps are durable before the header points to them.
    BitmapsBeforeHeader,
    /// Warning bits (bitmaps in use, bitmaps untrusted) are durable before the change they warn of.
    WarningBeforeChange,
}

/// Which rules are kept: all of them, unless a test switches one off.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rules {
    #[cfg(feature = "unstable-mutants")]
    pub(crate) broken: Option<OrderingRule>,
}

impl Rules {
    /// True if `rule` is kept.
    #[cfg(feature = "unstable-mutants")]
    pub(crate) fn keep(&self, rule: OrderingRule) -> bool {
        self.broken != Some(rule)
    }

    /// Always true: only tests can switch a rule off.
    #[cfg(not(feature = "unstable-mutants"))]
    pub(crate) const fn keep(&self, _rule: OrderingRule) -> bool {
        true
    }
}
