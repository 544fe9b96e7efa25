//! Steps of the engine, for tests that inject faults or suspend requests at chosen steps.

/// A step of the engine, with the name of QEMU's `blkdebug`. Reported right before the step's storage call.
///
/// This engine does not have all of QEMU's steps: the others are known by name ([`Event::Foreign`]) and never
/// reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Event {
    /// The storage was opened; reported by the storage itself.
    None,
    /// L1 entries or header fields about the L1 table are written.
    L1Update,
    /// A longer L1 table is written.
    L1GrowWriteTable,
    /// The header is switched to a longer L1 table.
    L1GrowActivateTable,
    /// A part of an L2 table is read.
    L2Load,
    /// L2 entries are written.
    L2Update,
    /// A new L2 table is written.
    L2AllocWrite,
    /// A shared L2 table is read to be copied.
    L2AllocCowRead,
    /// Guest bytes are read.
    ReadAio,
    /// Guest bytes are read from the backing file.
    ReadBackingAio,
    /// A compressed cluster is read.
    ReadCompressed,
    /// Guest bytes are written.
    WriteAio,
    /// A compressed cluster is written.
    WriteCompressed,
    /// Copy-on-write edges are read.
    CowRead,
    /// Copy-on-write edges are written.
    CowWrite,
    /// The refcount table is read.
    ReftableLoad,
    /// Entries of the refcount table are written.
    ReftableUpdate,
    /// A part of a refcount block is read.
    RefblockLoad,
    /// A part of a refcount block is written.
    RefblockUpdatePart,
    /// A refcount block is allocated.
    RefblockAlloc,
    /// A larger refcount table is written.
    RefblockAllocWriteTable,
    /// The header is switched to a larger refcount table.
    RefblockAllocSwitchTable,
    /// Clusters are allocated.
    ClusterAlloc,
    /// New clusters are zeroed beside what is written to them.
    ClusterAllocSpace,
    /// Clusters are freed.
    ClusterFree,
    /// A flush starts to write changed tables.
    FlushToOs,
    /// The storage is flushed.
    FlushToDisk,
    /// A write reaches the storage; reported by the storage itself.
    Pwritev,
    /// The first bytes of a write share a block with others, which is read; reported by the storage itself.
    PwritevRmwHead,
    /// That block was read; reported by the storage itself.
    PwritevRmwAfterHead,
    /// The last bytes of a write share a block with others, which is read; reported by the storage itself.
    PwritevRmwTail,
    /// That block was read; reported by the storage itself.
    PwritevRmwAfterTail,
    /// Zeroes reach the storage; reported by the storage itself.
    PwritevZero,
    /// A write is done; reported by the storage itself.
    PwritevDone,
    /// A step that this engine does not have, by its number in [`Event::NAMES`].
    Foreign(u8),
}

impl Event {
    /// All of `blkdebug`'s names, also of steps that this engine does not have.
    pub const NAMES: [&'static str; 48] = [
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l2_load",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_cow_read",
        "l2_alloc_write",
        "read_aio",
        "read_backing_aio",
        "read_compressed",
        "write_aio",
        "write_compressed",
        "vmstate_load",
        "vmstate_save",
        "cow_read",
        "cow_write",
        "reftable_load",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_free",
        "flush_to_os",
        "flush_to_disk",
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "empty_image_prepare",
        "l1_shrink_write_table",
        "l1_shrink_free_l2_clusters",
        "cor_write",
        "cluster_alloc_space",
        "none",
    ];

    /// The event with this name; `None` for an unknown name.
    ///
    /// ```
    /// use qcow2_core::Event;
    /// assert_eq!(Event::parse("l2_load"), Some(Event::L2Load));
    /// assert_eq!(Event::parse("nonsense"), None);
    /// ```
    pub fn parse(name: &str) -> Option<Self> {
        let index = Self::NAMES.iter().position(|known| *known == name)?;
        Some(match name {
            "none" => Self::None,
            "l1_update" => Self::L1Update,
            "l1_grow_write_table" => Self::L1GrowWriteTable,
            "l1_grow_activate_table" => Self::L1GrowActivateTable,
            "l2_load" => Self::L2Load,
            "l2_update" => Self::L2Update,
            "l2_alloc_write" => Self::L2AllocWrite,
            "l2_alloc_cow_read" => Self::L2AllocCowRead,
            "read_aio" => Self::ReadAio,
            "read_backing_aio" => Self::ReadBackingAio,
            "read_compressed" => Self::ReadCompressed,
            "write_aio" => Self::WriteAio,
            "write_compressed" => Self::WriteCompressed,
            "cow_read" => Self::CowRead,
            "cow_write" => Self::CowWrite,
            "reftable_load" => Self::ReftableLoad,
            "reftable_update" => Self::ReftableUpdate,
            "refblock_load" => Self::RefblockLoad,
            "refblock_update_part" => Self::RefblockUpdatePart,
            "refblock_alloc" => Self::RefblockAlloc,
            "refblock_alloc_write_table" => Self::RefblockAllocWriteTable,
            "refblock_alloc_switch_table" => Self::RefblockAllocSwitchTable,
            "cluster_alloc" => Self::ClusterAlloc,
            "cluster_alloc_space" => Self::ClusterAllocSpace,
            "cluster_free" => Self::ClusterFree,
            "flush_to_os" => Self::FlushToOs,
            "flush_to_disk" => Self::FlushToDisk,
            "pwritev_rmw_head" => Self::PwritevRmwHead,
            "pwritev_rmw_after_head" => Self::PwritevRmwAfterHead,
            "pwritev_rmw_tail" => Self::PwritevRmwTail,
            "pwritev_rmw_after_tail" => Self::PwritevRmwAfterTail,
            "pwritev" => Self::Pwritev,
            "pwritev_zero" => Self::PwritevZero,
            "pwritev_done" => Self::PwritevDone,
            _ => Self::Foreign(index as u8),
        })
    }
}

/// Observes the engine's steps on a storage that returns it from [`Storage::events`](crate::Storage::events).
pub trait Events: Send + Sync {
    /// Called before the step; the request waits until it returns.
    fn event(&self, event: Event);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_to_a_different_event() {
        let mut events: ::alloc::vec::Vec<_> = Event::NAMES.iter().filter_map(|n| Event::parse(n)).collect();
        assert_eq!(events.len(), Event::NAMES.len());
        events.sort_unstable();
        events.dedup();
        assert_eq!(events.len(), Event::NAMES.len());
    }
}
