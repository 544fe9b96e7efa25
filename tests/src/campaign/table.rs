//! What a campaign found, as a table.

use super::{Case, Damage, Repair, Verdict};
use std::fmt;

/// Both columns, and the cases that somebody has to look at.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Images that were damaged at random.
    pub random: Column,
    /// Semantic mutants.
    pub semantic: Column,
    /// The cases that break a rule.
    pub wrong: Vec<String>,
    /// The cases where the verdicts differ, and those where less is kept of an image that neither repairs.
    pub notes: Vec<String>,
}

/// Numbers about images that were damaged in one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the rows of the table say what each is")]
pub struct Column {
    pub images: u64,
    pub verdicts: [u64; 4],
    pub same_verdict: u64,
    pub failures: u64,
    pub reference_failed: u64,
    pub repaired: u64,
    pub reference_clean: u64,
    pub ours_clean: u64,
    pub only_reference_clean: u64,
    pub lost_snapshots: u64,
    pub said_clean: u64,
    pub reference_kept: u64,
    pub ours_kept: u64,
    pub more: u64,
    pub less: u64,
    pub less_of_clean: u64,
}

impl Case {
    /// Whether the verdicts differ, of which two are needed.
    pub(super) fn differs(&self) -> bool {
        self.verdicts.1.is_some() && self.verdicts.0 != self.verdicts.1
    }

    /// Whether the case breaks a rule.
    pub(super) fn is_wrong(&self) -> bool {
        let worse = |(mine, other): (Repair, Repair)| {
            let clean = mine.clean || !other.clean || lost_snapshots(mine, other);
            !clean || (other.clean && mine.kept < other.kept) || (mine.success && !mine.clean)
        };
        !self.failures.is_empty() || self.repairs.is_some_and(worse)
    }
}

/// Whether the reference has fewer snapshots. It writes a header without any where it opens an image with
/// bitmaps for a repair: what is wrong in snapshots is gone then, and so are they.
fn lost_snapshots(mine: Repair, other: Repair) -> bool {
    other.snapshots < mine.snapshots
}

impl Table {
    pub(super) fn add(&mut self, damage: Damage, case: Case) {
        let column = match damage {
            Damage::Random => &mut self.random,
            Damage::Semantic => &mut self.semantic,
        };
        column.add(&case);
        let kept_less = case.repairs.is_some_and(|(mine, other)| mine.kept < other.kept);
        if case.is_wrong() {
            self.wrong.push(format!("{case:?}"));
        } else if case.differs() || kept_less {
            self.notes.push(format!("{case:?}"));
        }
    }

    /// Every broken rule, in words; empty where the campaign passes.
    pub fn broken(&self) -> Vec<String> {
        let mut broken = self.wrong.clone();
        for (name, column) in [("random", self.random), ("semantic", self.semantic)] {
            // Short runs may differ once.
            if column.same_verdict * 1000 < column.images * 995 && column.images > column.same_verdict + 1 {
                broken.push(format!("{name}: {} of {} verdicts", column.same_verdict, column.images));
            }
        }
        broken
    }
}

impl Column {
    fn add(&mut self, case: &Case) {
        self.images += 1;
        self.failures += case.failures.len() as u64;
        self.reference_failed += u64::from(case.reference_failed);
        // Where the reference gives no answer, there is none to agree with.
        self.same_verdict += u64::from(case.verdicts.1.is_none() || case.verdicts.0 == case.verdicts.1);
        if let Some(verdict) = case.verdicts.1 {
            let index = match verdict {
                Verdict::Clean => 0,
                Verdict::Leaks => 1,
                Verdict::Corrupt => 2,
                Verdict::Cannot => 3,
            };
            self.verdicts[index] += 1;
        }
        let Some((mine, other)) = case.repairs else { return };
        self.repaired += 1;
        self.reference_clean += u64::from(other.clean);
        self.ours_clean += u64::from(mine.clean);
        self.only_reference_clean += u64::from(other.clean && !mine.clean);
        let lost = lost_snapshots(mine, other);
        self.lost_snapshots += u64::from(other.clean && !mine.clean && lost);
        self.said_clean += u64::from(mine.success && !mine.clean);
        self.reference_kept += other.kept;
        self.ours_kept += mine.kept;
        self.more += u64::from(mine.kept > other.kept);
        self.less += u64::from(mine.kept < other.kept);
        self.less_of_clean += u64::from(other.clean && mine.kept < other.kept);
    }

    fn rows(&self) -> [(&'static str, u64); 19] {
        [
            ("images", self.images),
            ("  check by the reference: clean", self.verdicts[0]),
            ("  leaks", self.verdicts[1]),
            ("  corrupt", self.verdicts[2]),
            ("  cannot", self.verdicts[3]),
            ("  ours says the same", self.same_verdict),
            ("runs of ours that crash, are late or large", self.failures),
            ("images on which the reference crashes or loops", self.reference_failed),
            ("images repaired (-r all)", self.repaired),
            ("  clean after the reference", self.reference_clean),
            ("  clean after ours", self.ours_clean),
            ("  clean after the reference alone", self.only_reference_clean),
            ("    which lost the snapshots", self.lost_snapshots),
            ("  ours says clean, the reference does not", self.said_clean),
            ("  guest clusters kept by the reference", self.reference_kept),
            ("  guest clusters kept by ours", self.ours_kept),
            ("  images of which ours keeps more", self.more),
            ("  images of which ours keeps less", self.less),
            ("    and the reference ends clean", self.less_of_clean),
        ]
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:48}{:>10}{:>10}", "", "random", "semantic")?;
        for ((name, random), (_, semantic)) in self.random.rows().iter().zip(self.semantic.rows()) {
            writeln!(f, "{name:48}{random:>10}{semantic:>10}")?;
        }
        Ok(())
    }
}
