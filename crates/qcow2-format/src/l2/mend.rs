//! What a damaged L2 entry can become without a guess.

use super::{
    COMPRESSED, COPIED, ClusterEntry, L2Entry, L2Format, MAX_HOST_OFFSET, OFFSET_MASK, RESERVED, ZERO,
};
use crate::units::HostOffset;

/// What a repair may make of an entry that a check complains of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Mend {
    /// Nothing is wrong with its form.
    Sound,
    /// These two words read the same as the damaged ones, or read where those cannot be read at all and mean
    /// the only thing they can mean.
    Same(u64, u64),
    /// The host offset is not cluster aligned. Rounded down it names the cluster at `host`; whether that is
    /// meant, the rest of the image must tell.
    IfOwned {
        /// The words with the rounded offset.
        words: (u64, u64),
        /// The cluster.
        host: HostOffset,
    },
    /// The entry contradicts itself: any choice would be a guess.
    Undecided,
}

impl L2Format {
    /// What a repair may make of an entry. `raw`: its first word; `bitmap`: its second one with extended L2
    /// entries, else 0.
    ///
    /// Reserved bits are cleared: no reader looks at them. The copied flag and the subcluster bitmap of a
    /// compressed cluster are cleared: it is one stream, stored once. A preallocated zero cluster at an
    /// impossible place becomes a plain zero cluster: its bytes were never read.
    pub fn mend(&self, raw: u64, bitmap: u64) -> L2Mend {
        if raw & COMPRESSED != 0 {
            return self.mend_compressed(raw, bitmap);
        }
        let extended = self.geometry.extended_l2();
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        let clean = raw & !RESERVED;
        let offset = clean & OFFSET_MASK;
        let zero_flag = clean & ZERO != 0 && !extended;
        let unassigned = offset == 0 && !(self.external_data && clean & COPIED != 0 && !zero_flag);
        if extended && (allocated & zero != 0 || unassigned && allocated != 0) {
            return L2Mend::Undecided;
        }
        if self.geometry.is_aligned(offset) {
            return if clean == raw { L2Mend::Sound } else { L2Mend::Same(clean, bitmap) };
        }
        let reads_host = if extended { allocated != 0 } else { !zero_flag };
        if reads_host {
            let host = self.geometry.align_down(offset);
            let words = (clean & !OFFSET_MASK | host, bitmap);
            return match host {
                _ if self.external_data => L2Mend::Undecided,
                0 => L2Mend::Undecided,
                host => L2Mend::IfOwned { words, host: HostOffset::new(host) },
            };
        }
        let plain = if extended { 0 } else { ZERO };
        L2Mend::Same(plain, bitmap)
    }

    fn mend_compressed(&self, raw: u64, bitmap: u64) -> L2Mend {
        let clean = raw & !COPIED;
        if self.external_data || self.offset_bits(raw).value() > MAX_HOST_OFFSET {
            return L2Mend::Undecided;
        }
        match (clean, bitmap) == (raw, 0) {
            true => L2Mend::Sound,
            false => L2Mend::Same(clean, 0),
        }
    }

    /// The words of an entry that has no host cluster and reads zeroes where this one reads its host cluster,
    /// and where that is. `None` where it reads none, and where no entry says so: in version 2, in an
    /// external data file, and for compressed clusters.
    pub fn as_zeroes(&self, raw: u64, bitmap: u64) -> Option<((u64, u64), HostOffset)> {
        let Ok(L2Entry::Standard(entry)) = self.decode(raw, bitmap) else { return None };
        let host = entry.host.filter(|_| self.zero_flag && !self.external_data)?;
        let zero = entry.zero | entry.allocated;
        let plain = ClusterEntry { host: None, copied: false, allocated: 0, zero };
        (entry.allocated != 0).then(|| (self.encode_standard(&plain), host))
    }

    /// An entry's first word with its copied flag set or cleared.
    pub const fn with_copied_flag(raw: u64, copied: bool) -> u64 {
        if copied { raw | COPIED } else { raw & !COPIED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Geometry, GeometryFields};
    use proptest::prelude::*;

    fn format(extended_l2: bool, external_data: bool) -> L2Format {
        let fields = GeometryFields { cluster_bits: 16, refcount_order: 4, extended_l2 };
        L2Format { geometry: Geometry::new(fields).unwrap(), zero_flag: true, external_data }
    }

    #[test]
    fn each_kind_of_damage() {
        let plain = format(false, false);
        let owned = |raw, host| L2Mend::IfOwned { words: (raw, 0), host: HostOffset::new(host) };
        for (raw, mended) in [
            (0, L2Mend::Sound),
            (COPIED | 0x50000, L2Mend::Sound),
            (COPIED | 0x50000 | 2, L2Mend::Same(COPIED | 0x50000, 0)),
            (2, L2Mend::Same(0, 0)),
            (COPIED | 0x50200, owned(COPIED | 0x50000, 0x50000)),
            (COPIED | 0x200, L2Mend::Undecided),
            (COPIED | 0x50201, L2Mend::Same(ZERO, 0)),
            (COMPRESSED | 0x50010, L2Mend::Sound),
            (COPIED | COMPRESSED | 0x50010, L2Mend::Same(COMPRESSED | 0x50010, 0)),
        ] {
            assert_eq!(plain.mend(raw, 0), mended, "{raw:#x}");
        }
        let extended = format(true, false);
        let zeroes = 7 << 32;
        for (raw, bitmap, mended) in [
            (COPIED | 0x50000, 1 | 1 << 32, L2Mend::Undecided),
            (0, 1, L2Mend::Undecided),
            (COPIED | 0x50200, zeroes, L2Mend::Same(0, zeroes)),
            (COMPRESSED | 0x50010, 5, L2Mend::Same(COMPRESSED | 0x50010, 0)),
        ] {
            assert_eq!(extended.mend(raw, bitmap), mended, "{raw:#x} {bitmap:#x}");
        }
    }

    proptest! {
        /// A mended entry is sound, decodes, and reads as the damaged one where that decodes.
        #[test]
        fn mending_settles_and_changes_nothing_that_can_be_read(
            raw: u64, bitmap: u64, bits in 0..4u32, extended: bool, external: bool,
        ) {
            let format = format(extended, external);
            // Mostly small offsets, so that aligned ones come up.
            let raw = if bits == 0 { raw } else { raw & (0xff00_0000_0000_01ff | 0xf << (14 + bits)) };
            let bitmap = if extended { bitmap } else { 0 };
            if let L2Mend::Same(first, second) = format.mend(raw, bitmap) {
                prop_assert_eq!(format.mend(first, second), L2Mend::Sound);
                let new = format.decode(first, second);
                prop_assert!(new.is_ok());
                if let Ok(old) = format.decode(raw, bitmap) {
                    prop_assert_eq!(new.unwrap(), old);
                }
            }
            if let L2Mend::IfOwned { words: (first, second), host } = format.mend(raw, bitmap) {
                prop_assert_eq!(format.mend(first, second), L2Mend::Sound);
                prop_assert!(format.geometry.is_aligned(host.value()) && host.value() > 0);
            }
        }
    }
}
