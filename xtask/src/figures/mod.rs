//! Code metrics of the project, and their bounds.

mod bounds;
mod circles;
mod lines;
mod shapes;

use crate::ci::report;
use crate::source::Source;
use crate::tree::{self, File};
use bounds::{BOUNDS, EXEMPT, Measured};
use circles::Circle;
use lines::{Lengths, Lines, MAX_COLUMNS};
use std::collections::BTreeMap;
use std::path::Path;

/// The crate whose share of the lines is bounded.
const COMMAND: &str = "qcow2-cli";
/// The crate whose assertions are counted.
const ENGINE: &str = "qcow2-core";
/// The crate under `crates/` that is not part of the product: only tests use it.
const TEST_WORLD: &str = "qcow2-testkit";

/// Prints every metric of the workspace under `root`, and fails if a bound is exceeded.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let files = tree::text_files(root).map_err(|e| format!("cannot read the workspace: {e}"))?;
    let crates = crates(&files);
    let mut measured = Vec::new();
    sizes(&crates, &mut measured);
    import_circles(&crates, &mut measured);
    wide(&crates, &mut measured);
    long_lines(&files, &mut measured);
    print_bounds(&measured);
    report(Ok(bounds::judge(&measured, EXEMPT)))
}

/// The sources of every product crate, by crate name.
fn crates(files: &[File]) -> BTreeMap<&str, Vec<Source<'_>>> {
    let mut crates = BTreeMap::<_, Vec<_>>::new();
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        let Some((name, below)) = file.path.strip_prefix("crates/").and_then(|p| p.split_once('/')) else {
            continue;
        };
        if name != TEST_WORLD && below.starts_with("src/") {
            crates.entry(name).or_default().push(Source::new(&file.path, &file.text));
        }
    }
    crates
}

fn sizes(crates: &BTreeMap<&str, Vec<Source<'_>>>, measured: &mut Vec<Measured>) {
    let mut all = Lines::default();
    let mut rows = Vec::new();
    for (name, sources) in crates {
        let mut lines = Lines::default();
        sources.iter().for_each(|source| lines.add(Lines::of(source)));
        all.add(lines);
        rows.push((*name, lines));
    }
    println!("Source lines of the product, without tests:");
    println!(
        "  {:<16} {:>7} {:>8} {:>8} {:>10} {:>11}",
        "crate", "lines", "share", "//", "// per 100", "assertions"
    );
    for (name, lines) in rows.iter().copied().chain([("all", all)]) {
        let per_cent = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
        let (share, why) = (per_cent(lines.all, all.all), per_cent(lines.why, lines.all));
        let (count, notes, stated) = (lines.all, lines.why, lines.assertions);
        println!("  {name:<16} {count:>7} {share:>6.1} % {notes:>8} {why:>10.2} {stated:>11}");
        let mut add = |figure, seen| {
            measured.push(Measured { figure, place: name.to_owned(), seen, at: String::new() })
        };
        if name == COMMAND {
            add("cli-lines", lines.all);
            add("cli-share", (lines.all * 100).div_ceil(all.all));
        }
        if name == ENGINE {
            add("assertions", lines.all.div_ceil(lines.assertions.max(1)));
        }
    }
}

fn import_circles(crates: &BTreeMap<&str, Vec<Source<'_>>>, measured: &mut Vec<Measured>) {
    println!("\nFiles of a crate that import each other:");
    for (name, sources) in crates {
        let circles = circles::circles(sources);
        for Circle { files } in &circles {
            let names: Vec<_> = files.iter().map(|(file, _)| *file).collect();
            println!("  {name}, {} files: {}", files.len(), names.join(" "));
            if files.len() > most("circle") {
                files.iter().for_each(|(file, imports)| println!("    {file} -> {}", imports.join(" ")));
            }
        }
        let seen = circles.first().map_or(0, |circle| circle.files.len());
        measured.push(Measured { figure: "circle", place: (*name).to_owned(), seen, at: String::new() });
    }
}

/// Structs and functions over the bound of their metric.
fn wide(crates: &BTreeMap<&str, Vec<Source<'_>>>, measured: &mut Vec<Measured>) {
    let kinds = [("fields", shapes::structs as Shapes), ("parameters", shapes::functions)];
    for (figure, shapes) in kinds {
        let most = most(figure);
        let mut found = Vec::new();
        for (name, sources) in crates {
            for source in sources {
                found.extend(shapes(source).into_iter().map(|shape| Measured {
                    figure,
                    place: format!("{name}::{}", shape.name),
                    seen: shape.count,
                    at: format!("{}:{}", source.path, shape.line),
                }));
            }
        }
        let highest = found.iter().map(|shape| shape.seen).max().unwrap_or(0);
        found.retain(|shape| shape.seen > most);
        found.sort_by_key(|shape| std::cmp::Reverse(shape.seen));
        println!("\nMore than {most} {figure} (the most is {highest}): {} places", found.len());
        for shape in &found {
            println!("  {:>3}  {}  ({})", shape.seen, shape.place, shape.at);
        }
        measured.append(&mut found);
    }
}

type Shapes = fn(&Source<'_>) -> Vec<shapes::Shape>;

fn long_lines(files: &[File], measured: &mut Vec<Measured>) {
    let mut areas = BTreeMap::<&str, Lengths>::new();
    for file in files.iter().filter(|file| file.path.ends_with(".rs") || file.path.ends_with(".md")) {
        areas.entry(area(&file.path)).or_default().add(file);
    }
    println!("\nLines over {MAX_COLUMNS} columns, and the longest of code and of comments:");
    for (area, lengths) in areas {
        let longest = [&lengths.code, &lengths.comment].map(|l| match l.columns {
            0 => "none".to_owned(),
            columns => format!("{columns} ({})", l.place),
        });
        println!("  {area:<16} {:>4}  {}", lengths.over, longest.join(", "));
        let at =
            [lengths.code, lengths.comment].into_iter().max_by_key(|l| l.columns).unwrap_or_default().place;
        measured.push(Measured { figure: "long-lines", place: area.to_owned(), seen: lengths.over, at });
    }
}

/// The crate or folder that a file belongs to; `pages` for files at the root.
fn area(path: &str) -> &str {
    let below = path.strip_prefix("crates/").unwrap_or(path);
    below.split_once('/').map_or("pages", |(area, _)| area)
}

fn most(figure: &str) -> usize {
    BOUNDS.iter().find(|bound| bound.figure == figure).map_or(usize::MAX, |bound| bound.most)
}

fn print_bounds(measured: &[Measured]) {
    println!("\nBounds:");
    for bound in BOUNDS {
        println!("  {:<10} {:>5} {}: {}", bound.figure, bound.most, bound.unit, bound.reason);
    }
    println!("\nOver a bound, and what is allowed today:");
    for over in measured.iter().filter(|m| m.seen > most(m.figure)) {
        let exempt = EXEMPT.iter().find(|e| e.figure == over.figure && e.place == over.place);
        let today = exempt.map_or_else(|| "no exemption".to_owned(), |e| e.today.to_string());
        println!("  {:<10} {:<20} {:>5} ({today})", over.figure, over.place, over.seen);
    }
}
