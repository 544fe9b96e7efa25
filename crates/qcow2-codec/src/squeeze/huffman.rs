//! Length-limited Huffman codes.

/// The longest code, in bits.
pub(crate) const MAX_BITS: usize = 15;

/// Sets `lens[i]` to the code length of the symbol that occurs `counts[i]` times: 0 for unused symbols, at
/// most `limit` bits for the others. Even an empty alphabet gets one code, because readers require it.
pub(crate) fn code_lengths(counts: &[u32], limit: usize, lens: &mut [u8]) {
    lens.fill(0);
    let mut order = [0u64; 288];
    let mut used = 0;
    for (symbol, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
        order[used] = u64::from(count) << 16 | symbol as u64;
        used += 1;
    }
    if used < 2 {
        let symbol = if used == 1 { (order[0] & 0xffff) as usize } else { 0 };
        lens[symbol] = 1;
        return;
    }
    let order = &mut order[..used];
    order.sort_unstable();
    let mut depths = [0u32; 288];
    for (depth, &entry) in depths.iter_mut().zip(order.iter()) {
        *depth = (entry >> 16) as u32;
    }
    minimum_redundancy(&mut depths[..used]);
    let mut per_length = [0u32; 64];
    for &depth in &depths[..used] {
        per_length[(depth as usize).min(limit)] += 1;
    }
    enforce_limit(&mut per_length, limit);
    // The rarest symbols come first and get the longest codes.
    let mut rest = order.iter();
    for len in (1..=limit).rev() {
        for &entry in rest.by_ref().take(per_length[len] as usize) {
            lens[(entry & 0xffff) as usize] = len as u8;
        }
    }
}

/// Turns ascending weights into the depths of their leaves in an optimal tree, in place (Moffat and
/// Katajainen, 1995).
fn minimum_redundancy(a: &mut [u32]) {
    let n = a.len();
    a[0] += a[1];
    let (mut root, mut leaf) = (0, 2);
    for next in 1..n - 1 {
        if leaf >= n || a[root] < a[leaf] {
            a[next] = a[root];
            a[root] = next as u32;
            root += 1;
        } else {
            a[next] = a[leaf];
            leaf += 1;
        }
        if leaf >= n || (root < next && a[root] < a[leaf]) {
            a[next] += a[root];
            a[root] = next as u32;
            root += 1;
        } else {
            a[next] += a[leaf];
            leaf += 1;
        }
    }
    a[n - 2] = 0;
    for next in (0..n - 2).rev() {
        a[next] = a[a[next] as usize] + 1;
    }
    let (mut available, mut depth) = (1, 0);
    let (mut root, mut next) = (n as isize - 2, n as isize - 1);
    while available > 0 {
        let mut used = 0;
        while root >= 0 && a[root as usize] == depth {
            used += 1;
            root -= 1;
        }
        while available > used {
            a[next as usize] = depth;
            next -= 1;
            available -= 1;
        }
        available = 2 * used;
        depth += 1;
    }
}

/// Restores a complete code after lengths above `limit` have been cut down to it.
fn enforce_limit(per_length: &mut [u32; 64], limit: usize) {
    let full = 1u64 << limit;
    let mut total: u64 = (1..=limit).map(|len| u64::from(per_length[len]) << (limit - len)).sum();
    while total > full {
        per_length[limit] -= 1;
        if let Some(len) = (1..limit).rev().find(|&len| per_length[len] > 0) {
            per_length[len] -= 1;
            per_length[len + 1] += 2;
        }
        total -= 1;
    }
}

/// The canonical codes for these lengths, first bit lowest, as deflate stores them.
pub(crate) fn codes(lens: &[u8], codes: &mut [u16]) {
    let mut per_length = [0u16; MAX_BITS + 1];
    for &len in lens {
        per_length[usize::from(len)] += 1;
    }
    per_length[0] = 0;
    let mut next = [0u16; MAX_BITS + 2];
    for len in 1..=MAX_BITS {
        next[len + 1] = (next[len] + per_length[len]) << 1;
    }
    for (code, &len) in codes.iter_mut().zip(lens) {
        let len = usize::from(len);
        if len > 0 {
            *code = next[len].reverse_bits() >> (16 - len);
            next[len] += 1;
        }
    }
}
