//! Prints the options and operands that it is given: `options -v --out=x y`.
#![allow(clippy::print_stdout, reason = "an example")]

use qcow2_getopt::{Getopt, OptionSpec};

const fn option(short: char, long: &'static str, value: Option<&'static str>) -> OptionSpec<char> {
    OptionSpec { opt: short, short: Some(short), long: Some(long), exact: false, own: false, value, help: "" }
}

fn main() -> Result<(), String> {
    let specs = [option('v', "verbose", None), option('o', "output", Some("FILE"))];
    let mut getopt = Getopt::new(&specs, std::env::args().skip(1).collect(), true);
    while let Some(given) = getopt.next()? {
        println!("-{} {}", given.opt, given.value);
    }
    println!("{}", getopt.into_operands().join(" "));
    Ok(())
}
