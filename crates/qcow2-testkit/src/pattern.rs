//! Guest content derived from a seed and the byte's own offset, so that misplaced bytes are detected.

/// The seed of all zeroes, which tools may store as zero clusters.
pub const ZEROES: u64 = 0;

/// Fills `buf` with the content from `offset` on. Seed 0 gives zeroes; a seed divisible by 4 gives content
/// that compresses well; any other seed gives incompressible content. The same offset and seed give the same
/// byte, however the range is split.
pub fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    if seed == ZEROES {
        return buf.fill(0);
    }
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        let from = (at % 8) as usize;
        let (part, next) = rest.split_at_mut(rest.len().min(8 - from));
        part.copy_from_slice(&word(seed, at / 8).to_le_bytes()[from..from + part.len()]);
        at = at.wrapping_add(part.len() as u64);
        rest = next;
    }
}

/// [`fill`] as a new buffer of `len` bytes.
pub fn bytes(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    fill(seed, offset, &mut buf);
    buf
}

/// Fill byte of buffers before a read, so that bytes which the read leaves out are not zero by chance.
pub const UNREAD: u8 = 0xa5;

/// A buffer of `len` bytes to read into, full of [`UNREAD`].
pub fn unread(len: usize) -> Vec<u8> {
    vec![UNREAD; len]
}

/// Eight bytes of content; compressible seeds change it only every 64 bytes.
fn word(seed: u64, index: u64) -> u64 {
    let index = if seed.is_multiple_of(4) { index / 8 } else { index };
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let mixed = z ^ (z >> 32);
    if seed.is_multiple_of(4) { (mixed & 0xff) * 0x0101_0101_0101_0101 } else { mixed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_depends_on_seed_and_offset_only() {
        let whole = bytes(5, 100, 1000);
        for cut in [0, 1, 7, 8, 9, 512, 999] {
            assert_eq!(bytes(5, 100, cut), whole[..cut]);
            assert_eq!(bytes(5, 100 + cut as u64, 1000 - cut), whole[cut..]);
        }
        assert_ne!(bytes(6, 100, 1000), whole);
        assert_ne!(bytes(5, 612, 1000), whole);
    }

    #[test]
    fn seeds_choose_zero_compressible_or_random_content() {
        assert!(bytes(ZEROES, 3, 99).iter().all(|&b| b == 0));
        let changes = |seed| bytes(seed, 0, 4096).windows(2).filter(|w| w[0] != w[1]).count();
        assert!(changes(8) < 64 && changes(9) > 4000, "{} {}", changes(8), changes(9));
    }
}
