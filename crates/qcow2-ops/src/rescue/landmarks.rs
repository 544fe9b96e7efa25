//! Structures in the guest's data that say where on the disk they are. They tell which range an L2 table maps
//! where no L1 table does.
//!
//! | structure | where | what it says |
//! |---|---|---|
//! | GPT header, the second one | at the end of the disk, as the first one says | its own sector |
//! | ext2, ext3, ext4 superblock | the first, and copies in groups 1 and powers of 3, 5, 7 | its group |
//! | XFS allocation group header | at the start of each group | the number of its group |
//!
//! A partition begins where an MBR or a GPT says, or the whole disk is one.

/// Bytes of a structure that are looked at.
pub(super) const WINDOW: usize = 1024;

/// Structures of one disk that are looked for at most. Origin: ours.
const MAX_LANDMARKS: usize = 4096;
/// Partitions and groups of one partition at most. Origin: ours.
const MAX_PARTITIONS: usize = 128;
const MAX_GROUPS: u64 = 1024;

const SECTOR: u64 = 512;
const GPT_MAGIC: &[u8] = b"EFI PART";
const EXT_MAGIC: [u8; 2] = [0x53, 0xef];
/// Where the first ext superblock is, from the start of its partition.
const EXT_START: u64 = 1024;

/// A structure: where it has to be on the disk, and bytes that it has there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Landmark {
    pub(super) offset: u64,
    parts: Vec<(usize, Vec<u8>)>,
}

impl Landmark {
    /// Whether the structure is in `window`, which begins where it should.
    pub(super) fn is_in(&self, window: &[u8]) -> bool {
        self.parts.iter().all(|(at, bytes)| window.get(*at..*at + bytes.len()) == Some(bytes))
    }
}

/// Whether these bytes, a disk's first `8 * WINDOW`, can be the start of one: a partition table, or a file
/// system without.
pub(super) fn is_start(bytes: &[u8]) -> bool {
    let boot = part(bytes, 510, 2) == Some(&[0x55, 0xaa]);
    boot || part(bytes, 512, 8) == Some(GPT_MAGIC)
        || ext_group(bytes, EXT_START as usize) == Some(0)
        || is_xfs(bytes)
}

/// Where the partitions of a disk that starts with `bytes` begin, the disk itself included; and the second
/// GPT header.
pub(super) fn partitions(bytes: &[u8]) -> (Vec<u64>, Option<Landmark>) {
    let mut starts = vec![0];
    for index in 0..4 {
        starts.extend(u32_le(bytes, 446 + 16 * index + 8).map(u64::from));
    }
    let mut second = None;
    if part(bytes, 512, 8) == Some(GPT_MAGIC) {
        for index in 0..MAX_PARTITIONS {
            starts.extend(u64_le(bytes, 1024 + 128 * index + 32));
        }
        let place = u64_le(bytes, 512 + 32).and_then(|sector| Some((sector, sector.checked_mul(SECTOR)?)));
        let disk = part(bytes, 512 + 56, 16);
        second = place.zip(disk).map(|((sector, offset), disk)| {
            let own = sector.to_le_bytes().to_vec();
            Landmark { offset, parts: vec![(0, GPT_MAGIC.to_vec()), (24, own), (56, disk.to_vec())] }
        });
    }
    let mut starts: Vec<u64> = starts.into_iter().filter_map(|sector| sector.checked_mul(SECTOR)).collect();
    starts.sort_unstable();
    starts.dedup();
    starts.truncate(MAX_PARTITIONS);
    (starts, second)
}

/// The structures of the file system whose partition begins at `start` with `bytes`.
pub(super) fn of_file_system(start: u64, bytes: &[u8]) -> Vec<Landmark> {
    let mut found = ext_copies(start, bytes).or_else(|| xfs_groups(start, bytes)).unwrap_or_default();
    found.truncate(MAX_LANDMARKS);
    found
}

/// The group of the ext superblock at byte `at`.
fn ext_group(bytes: &[u8], at: usize) -> Option<u16> {
    let group = part(bytes, at + 90, 2)?;
    (part(bytes, at + 56, 2)? == EXT_MAGIC).then(|| u16::from_le_bytes([group[0], group[1]]))
}

fn ext_copies(start: u64, bytes: &[u8]) -> Option<Vec<Landmark>> {
    let superblock = bytes.get(EXT_START as usize..)?;
    if ext_group(superblock, 0)? != 0 {
        return None;
    }
    let (blocks, first) = (u64::from(u32_le(superblock, 4)?), u64::from(u32_le(superblock, 20)?));
    let block_size = 1024u64.checked_shl(u32_le(superblock, 24)?.min(6))?;
    let per_group = u64::from(u32_le(superblock, 32)?).max(1);
    let uuid = part(superblock, 104, 16)?.to_vec();
    let copy = |group: u64| {
        let block = group.checked_mul(per_group)?.checked_add(first)?;
        let offset = start.checked_add(block.checked_mul(block_size)?)?;
        let number = u16::try_from(group).ok()?.to_le_bytes().to_vec();
        (block < blocks).then(|| Landmark {
            offset,
            parts: vec![(56, EXT_MAGIC.to_vec()), (90, number), (104, uuid.clone())],
        })
    };
    let power_of = |base: u64| std::iter::successors(Some(base), move |power| power.checked_mul(base));
    let powers = [3, 5, 7].into_iter().flat_map(|base| power_of(base).take_while(|&power| power < 1 << 16));
    // Older file systems have a copy in every group.
    let groups = (1..MAX_GROUPS).chain(powers.filter(|&group| group >= MAX_GROUPS));
    Some(groups.filter_map(copy).collect())
}

fn is_xfs(bytes: &[u8]) -> bool {
    part(bytes, 0, 4) == Some(b"XFSB")
}

fn xfs_groups(start: u64, bytes: &[u8]) -> Option<Vec<Landmark>> {
    if !is_xfs(bytes) {
        return None;
    }
    let (block_size, blocks) = (u32_be(bytes, 4)?, u32_be(bytes, 84)?);
    let (groups, uuid) = (u64::from(u32_be(bytes, 88)?), part(bytes, 32, 16)?.to_vec());
    let group = |number: u64| {
        let offset = u64::from(block_size).checked_mul(blocks.into())?.checked_mul(number)?;
        let own = u32::try_from(number).ok()?.to_be_bytes().to_vec();
        let parts = vec![(0, b"XFSB".to_vec()), (32, uuid.clone()), (512, b"XAGF".to_vec()), (520, own)];
        Some(Landmark { offset: start.checked_add(offset)?, parts })
    };
    Some((1..groups.min(MAX_GROUPS)).filter_map(group).collect())
}

fn part(bytes: &[u8], at: usize, len: usize) -> Option<&[u8]> {
    bytes.get(at..at.checked_add(len)?)
}

fn u32_le(bytes: &[u8], at: usize) -> Option<u32> {
    part(bytes, at, 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u32_be(bytes: &[u8], at: usize) -> Option<u32> {
    part(bytes, at, 4)?.try_into().ok().map(u32::from_be_bytes)
}

fn u64_le(bytes: &[u8], at: usize) -> Option<u64> {
    part(bytes, at, 8)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sector 0 with a boot signature and a partition at 1 MiB, and an ext superblock there.
    fn disk() -> (Vec<u8>, Vec<u8>) {
        let mut start = vec![0; 8 * WINDOW];
        start[510..512].copy_from_slice(&[0x55, 0xaa]);
        start[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
        let mut partition = vec![0; 8 * WINDOW];
        let superblock = &mut partition[1024..];
        superblock[4..8].copy_from_slice(&1_000_000u32.to_le_bytes());
        superblock[24..28].copy_from_slice(&2u32.to_le_bytes());
        superblock[32..36].copy_from_slice(&32_768u32.to_le_bytes());
        superblock[56..58].copy_from_slice(&EXT_MAGIC);
        superblock[104..120].fill(7);
        (start, partition)
    }

    #[test]
    fn copies_of_a_superblock_are_where_their_group_is() {
        let (start, partition) = disk();
        assert!(is_start(&start) && !is_start(&vec![0; 8 * WINDOW]));
        let (starts, second) = partitions(&start);
        assert_eq!((starts, second), (vec![0, 1 << 20], None));
        let found = of_file_system(1 << 20, &partition);
        assert_eq!(found.len(), 30, "groups 1 to 30");
        let offset = (1 << 20) + 27 * (128 << 20);
        let copy = found.iter().find(|landmark| landmark.offset == offset).unwrap();
        let mut window = partition[1024..2048].to_vec();
        assert!(!copy.is_in(&window), "the first is not the copy of group 27");
        window[90] = 27;
        assert!(copy.is_in(&window) && !copy.is_in(&window[..100]));
    }

    #[test]
    fn the_second_gpt_header_is_where_the_first_says() {
        let (mut start, _) = disk();
        start[512..520].copy_from_slice(GPT_MAGIC);
        start[512 + 32..512 + 40].copy_from_slice(&99_999u64.to_le_bytes());
        let (_, second) = partitions(&start);
        let second = second.unwrap();
        assert_eq!(second.offset, 99_999 * 512);
        let mut header = start[512..].to_vec();
        assert!(!second.is_in(&header));
        header[24..32].copy_from_slice(&99_999u64.to_le_bytes());
        assert!(second.is_in(&header));
    }

    #[test]
    fn groups_of_xfs_have_numbers() {
        let mut start = vec![0; 8 * WINDOW];
        start[..4].copy_from_slice(b"XFSB");
        start[4..8].copy_from_slice(&4096u32.to_be_bytes());
        start[84..88].copy_from_slice(&65_536u32.to_be_bytes());
        start[88..92].copy_from_slice(&4u32.to_be_bytes());
        let found = of_file_system(0, &start);
        assert_eq!(found.iter().map(|l| l.offset >> 28).collect::<Vec<_>>(), [1, 2, 3]);
        start[512..516].copy_from_slice(b"XAGF");
        start[523] = 2;
        assert!(found[1].is_in(&start) && !found[0].is_in(&start));
    }

    #[test]
    fn any_bytes_are_taken() {
        for byte in [0xff, 0x53, 0x45] {
            for len in [0, 1, 600, 1030, 1200, 8 * WINDOW] {
                let bytes = vec![byte; len];
                is_start(&bytes);
                partitions(&bytes);
                of_file_system(u64::MAX, &bytes);
            }
        }
    }
}
