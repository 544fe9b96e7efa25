//! Checks our streams with other readers: a strict inflater of these tests, and qemu-img.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests")]

mod inflater;
mod oracle;
mod window;

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x >> 11
    }
}

/// `len` bytes of noise, runs, and copies over short and long distances: everything a match finder meets.
fn mixed(len: usize, seed: u64) -> Vec<u8> {
    let mut next = random(seed);
    let mut out: Vec<u8> = Vec::with_capacity(len + 4096);
    while out.len() < len {
        let count = 1 + next() as usize % 600;
        match next() % 5 {
            0 => out.extend((0..count).map(|_| next() as u8)),
            1 => out.extend(std::iter::repeat_n(next() as u8, count)),
            2 => out.extend((0..count).map(|_| b"eaoitn s"[next() as usize % 8])),
            _ if out.is_empty() => {}
            _ => {
                let start = next() as usize % out.len();
                let end = out.len().min(start + count);
                out.extend_from_within(start..end);
            }
        }
    }
    out.truncate(len);
    out
}
