//! Bounds of the code metrics, and the exemptions from them.

use crate::finding::Finding;

/// The largest allowed value of a metric, and the reason.
pub(super) struct Bound {
    pub(super) figure: &'static str,
    pub(super) most: usize,
    /// Unit of the value.
    pub(super) unit: &'static str,
    pub(super) reason: &'static str,
}

const fn bound(figure: &'static str, most: usize, unit: &'static str, reason: &'static str) -> Bound {
    Bound { figure, most, unit, reason }
}

/// The bounds. Each applies to every crate, folder or item that has the metric.
pub(super) const BOUNDS: &[Bound] = &[
    bound(
        "cli-lines",
        7_500,
        "lines",
        "the command parses, calls, renders and exits; work belongs to a library",
    ),
    bound("cli-share", 15, "% of the product", "what only the command can do, no other program can use"),
    bound("circle", 3, "files that import each other", "files in a circle can only be understood together"),
    bound("fields", 16, "fields", "above it a struct is several things under one name"),
    bound("parameters", 5, "parameters without self", "more are mixed up at the call; options are a struct"),
    bound(
        "assertions",
        100,
        "lines per assertion",
        "what the engine relies on is stated where it is relied on",
    ),
    bound(
        "long-lines",
        0,
        "lines over 110 columns",
        "two files fit side by side, and a review shows whole lines",
    ),
];

/// A crate, folder or item that is over a bound today.
pub(super) struct Exemption {
    pub(super) figure: &'static str,
    /// A crate, a folder, or an item of a crate.
    pub(super) place: &'static str,
    /// Its allowed value. Lower it when the code improves; never raise it.
    pub(super) today: usize,
}

/// An exemption; none is left, and none should come.
#[cfg(test)]
const fn today(figure: &'static str, place: &'static str, today: usize) -> Exemption {
    Exemption { figure, place, today }
}

/// Number of exemptions. Lower it when one is removed; never raise it.
#[cfg(test)]
const CEILING: usize = 0;

/// The exemptions. They only shrink: an exemption that is not needed any more, or that is 10 % too high, is a
/// finding itself.
pub(super) const EXEMPT: &[Exemption] = &[];

/// A measured value.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) figure: &'static str,
    pub(super) place: String,
    pub(super) seen: usize,
    /// The file to look at.
    pub(super) at: String,
}

/// Compares the measured values with the bounds and `exempt`.
pub(super) fn judge(measured: &[Measured], exempt: &[Exemption]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for seen in measured {
        let Some(bound) = BOUNDS.iter().find(|bound| bound.figure == seen.figure) else { continue };
        let today = exempt.iter().find(|e| e.figure == seen.figure && e.place == seen.place);
        let most = today.map_or(bound.most, |e| e.today.max(bound.most));
        if seen.seen > most {
            let count = format!("{} {}", seen.seen, bound.unit);
            let (place, text) = match seen.at.as_str() {
                "" => (seen.place.as_str(), count),
                at => (at, format!("{}: {count}", seen.place)),
            };
            findings.push(Finding::new(bound.figure, place, 0, text, format!("{most}: {}", bound.reason)));
        }
    }
    findings.extend(exempt.iter().filter_map(|e| stale(measured, e)));
    findings
}

fn stale(measured: &[Measured], exemption: &Exemption) -> Option<Finding> {
    let Exemption { figure, place, today } = exemption;
    let most = BOUNDS.iter().find(|bound| bound.figure == *figure).map_or(usize::MAX, |bound| bound.most);
    let same = measured.iter().filter(|m| m.figure == *figure && m.place == *place);
    let seen = same.map(|m| m.seen).max().unwrap_or(0);
    let allowed = if seen <= most {
        "no exemption: remove it, and lower the ceiling".to_owned()
    } else if seen * 10 < today * 9 {
        format!("{seen}: lower it")
    } else {
        return None;
    };
    let text = format!("an exemption from '{figure}' for {today}, where {seen} are needed");
    Some(Finding::new(
        "stale-exemption",
        *place,
        0,
        text,
        format!("{allowed} in xtask/src/figures/bounds.rs"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(seen: usize, exempt: &[Exemption], rules: &[&str]) {
        let measured = Measured { figure: "fields", place: "a::A".to_owned(), seen, at: "a.rs:1".to_owned() };
        let findings = judge(&[measured], exempt);
        assert_eq!(findings.iter().map(|f| f.rule).collect::<Vec<_>>(), rules, "{seen}: {findings:?}");
    }

    #[test]
    fn a_value_over_its_bound_is_found() {
        check(16, &[], &[]);
        check(17, &[], &["fields"]);
    }

    #[test]
    fn an_exemption_covers_its_place_up_to_its_value() {
        check(20, &[today("fields", "a::A", 20)], &[]);
        check(21, &[today("fields", "a::A", 20)], &["fields"]);
        check(20, &[today("fields", "a::B", 20)], &["fields", "stale-exemption"]);
        check(20, &[today("parameters", "a::A", 20)], &["fields", "stale-exemption"]);
    }

    #[test]
    fn an_exemption_that_is_too_high_is_found() {
        check(18, &[today("fields", "a::A", 20)], &[]);
        check(17, &[today("fields", "a::A", 20)], &["stale-exemption"]);
        check(16, &[today("fields", "a::A", 17)], &["stale-exemption"]);
    }

    #[test]
    fn the_number_of_exemptions_equals_the_ceiling() {
        assert_eq!(EXEMPT.len(), CEILING, "lower the ceiling with the list, and never raise it");
    }
}
