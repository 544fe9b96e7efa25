//! The name that somebody meant who mistyped it.

/// The first of the `names` nearest to `typed` that a slip of the finger or two lead from: letters that are
/// missing, too many, others, or swapped with their neighbours. One slip for up to four letters.
pub fn nearest<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let typed: Vec<char> = typed.chars().take(LONGEST + 1).collect();
    if typed.len() > LONGEST {
        return None;
    }
    let most = if typed.len() <= 4 { 1 } else { 2 };
    let near = names.map(|name| (distance(&typed, &name.chars().collect::<Vec<_>>()), name));
    near.filter(|(slips, _)| *slips <= most).min_by_key(|(slips, _)| *slips).map(|(_, name)| name)
}

/// Longer than any name: what is longer is no slip.
const LONGEST: usize = 40;

/// How many slips lead from `a` to `b`, no letter being touched twice.
fn distance(a: &[char], b: &[char]) -> usize {
    // Rows of the usual table, of which a swap needs the last but one.
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let other = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut slips = other.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                slips = slips.min(before[j - 2] + 1);
            }
            row.push(slips);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_finger() {
        let names = ["compare", "convert", "commit", "check", "dd", "map", "info"];
        for (typed, meant) in [
            ("convret", Some("convert")),
            ("comit", Some("commit")),
            ("chekc", Some("check")),
            ("checkk", Some("check")),
            ("conert", Some("convert")),
            ("cnovetr", Some("convert")),
            ("compere", Some("compare")),
            ("inof", Some("info")),
            ("mpa", Some("map")),
            ("pmap", Some("map")),
            ("d", Some("dd")),
            ("Convert", Some("convert")),
            ("cnvt", None),
            ("iso", None),
            ("mop3", None),
            ("delete", None),
            ("", None),
            ("überprüfen", None),
        ] {
            assert_eq!(nearest(typed, names.into_iter()), meant, "{typed}");
        }
        assert_eq!(nearest(&"x".repeat(1 << 20), names.into_iter()), None);
        // Where two are as near, the first.
        assert_eq!(nearest("cona", ["cone", "con"].into_iter()), Some("cone"));
    }

    #[test]
    fn swaps_count_once() {
        let slips =
            |a: &str, b: &str| distance(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
        assert_eq!((slips("ab", "ba"), slips("abcd", "badc"), slips("", "abc")), (1, 2, 3));
        assert_eq!((slips("abc", ""), slips("abc", "abc"), slips("ca", "abc")), (3, 0, 3));
    }
}
