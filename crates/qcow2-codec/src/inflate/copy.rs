//! Match copies within the output. Source and destination may overlap.

/// Bytes copied per step.
const STEP: usize = 16;

/// Copies `len` bytes from `distance` bytes before `at`, limited to the room in `out`. Returns the number of
/// bytes copied. `distance`: 1 to `at`.
#[inline(always)]
pub(super) fn copy_match(out: &mut [u8], at: usize, distance: usize, len: usize) -> usize {
    // Whole steps may write past the end of the match. Later output overwrites those bytes.
    match out.get_mut(at - distance..at + len + STEP) {
        Some(region) if distance >= STEP => copy_steps(region, distance, len),
        Some(region) => repeat(region, distance, len),
        None => return copy_near_end(out, at, distance, len),
    }
    len
}

#[inline(always)]
fn copy_steps(region: &mut [u8], distance: usize, len: usize) {
    let mut done = 0;
    while done < len {
        region.copy_within(done..done + STEP, done + distance);
        done += STEP;
    }
}

/// Repeats a pattern of fewer than 16 bytes.
#[inline(always)]
fn repeat(region: &mut [u8], distance: usize, len: usize) {
    let pattern = region.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let (pattern, step) = match distance {
        8.. => {
            let mut done = 0;
            while done < len {
                region.copy_within(done..done + 8, done + distance);
                done += 8;
            }
            return;
        }
        _ => widen(pattern, distance),
    };
    let mut done = 0;
    while done < len {
        if let Some(place) = region.get_mut(distance + done..).and_then(|rest| rest.first_chunk_mut::<8>()) {
            *place = pattern.to_le_bytes();
        }
        done += step;
    }
}

/// Widens a pattern of `distance` bytes (the lowest ones of `bytes`) to eight bytes. Returns it and the
/// number of bytes that whole repetitions cover.
#[inline(always)]
fn widen(bytes: u64, distance: usize) -> (u64, usize) {
    let mut bits = 8 * distance;
    let mut pattern = bytes & ((1 << bits) - 1);
    while bits < 64 {
        pattern |= pattern << bits;
        bits *= 2;
    }
    (pattern, 8 - 8 % distance)
}

#[cold]
fn copy_near_end(out: &mut [u8], at: usize, distance: usize, len: usize) -> usize {
    let end = out.len().min(at + len);
    for place in at..end {
        out[place] = out[place - distance];
    }
    end - at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_distance_and_length_matches_a_byte_wise_copy() {
        for distance in 1..40 {
            for len in 3..=258 {
                for room in [0, 1, 15, 16, 17, 400] {
                    let mut out: Vec<u8> =
                        (0..distance + len + room).map(|i| (i * 7 + i / 5) as u8).collect();
                    let mut expected = out.clone();
                    (0..len).for_each(|i| expected[distance + i] = expected[i]);
                    assert_eq!(copy_match(&mut out, distance, distance, len), len);
                    assert!(out[..distance + len] == expected[..distance + len], "{distance} {len} {room}");
                }
            }
        }
    }

    #[test]
    fn copy_stops_at_the_end_of_the_output() {
        let mut out = *b"ab......";
        assert_eq!(copy_match(&mut out, 2, 2, 258), 6);
        assert_eq!(&out, b"abababab");
        assert_eq!(copy_match(&mut out, 8, 1, 3), 0);
    }
}
