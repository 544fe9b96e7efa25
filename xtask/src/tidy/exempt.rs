//! The exemptions of `tidy`, and how an exemption list is applied. The list only shrinks: an entry that
//! covers nothing is a finding itself.

use crate::finding::Finding;

/// A rule that one file may break for now, and the reason.
pub(crate) struct Exemption {
    pub(crate) rule: &'static str,
    pub(crate) path: &'static str,
    pub(crate) reason: &'static str,
}

/// Number of exemptions. Lower it when one is removed; never raise it.
#[cfg(test)]
const CEILING: usize = 0;

/// Path of the list.
pub(super) const LIST: &str = "xtask/src/tidy/exempt.rs";
/// The exemptions.
pub(super) const EXEMPT: &[Exemption] = &[];

/// Drops the findings that `exempt` covers, and adds one for each exemption that covers none. `list`: the
/// file with the exemptions.
pub(crate) fn apply(findings: Vec<Finding>, exempt: &[Exemption], list: &str) -> Vec<Finding> {
    let covers = |e: &Exemption, f: &Finding| e.rule == f.rule && e.path == f.place;
    let stale: Vec<_> = exempt
        .iter()
        .filter(|e| !findings.iter().any(|f| covers(e, f)))
        .map(|e| {
            let seen = format!("an exemption from '{}' that covers nothing ({})", e.rule, e.reason);
            Finding::new("stale-exemption", e.path, 0, seen, format!("remove it from {list}"))
        })
        .collect();
    let open = findings.into_iter().filter(|f| !exempt.iter().any(|e| covers(e, f)));
    open.chain(stale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &[Exemption] = &[Exemption { rule: "unwrap", path: "a.rs", reason: "old code" }];

    fn check(rule: &'static str, place: &str, rules: &[&str]) {
        let findings = apply(vec![Finding::new(rule, place, 3, "x", "y")], ONE, LIST);
        assert_eq!(findings.iter().map(|f| f.rule).collect::<Vec<_>>(), rules);
    }

    #[test]
    fn an_exemption_covers_one_rule_in_one_file() {
        check("unwrap", "a.rs", &[]);
        check("unwrap", "b.rs", &["unwrap", "stale-exemption"]);
        check("print", "a.rs", &["print", "stale-exemption"]);
    }

    #[test]
    fn the_number_of_exemptions_equals_the_ceiling() {
        assert_eq!(EXEMPT.len(), CEILING, "lower the ceiling with the list, and never raise it");
    }
}
