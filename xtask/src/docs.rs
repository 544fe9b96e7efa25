//! Generates manual pages and shell completions from the command's option table (`qcow2 --describe`).

use serde_json::Value;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Writes all of them to `target/docs`, or to the folder given in `args`.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let folder = match args {
        [] => root.join("target/docs"),
        [folder] => PathBuf::from(folder),
        _ => return Err("docs takes one folder at most".to_owned()),
    };
    let table = describe(root)?;
    let mut count = 0;
    for (name, text) in files(&table) {
        let path = folder.join(&name);
        let parent = path.parent().unwrap_or(&folder);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&path, text))
            .map_err(|e| format!("{name}: {e}"))?;
        count += 1;
    }
    println!("{count} files in {}", folder.display());
    Ok(())
}

fn describe(root: &Path) -> Result<Value, String> {
    let mut command = Command::new(crate::cargo());
    command.args(["run", "--quiet", "--locked", "-p", "qcow2-cli", "--", "--describe"]).current_dir(root);
    let output = command.output().map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("qcow2 --describe: {}", String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("qcow2 --describe: {e}"))
}

/// File names and contents.
fn files(table: &Value) -> Vec<(String, String)> {
    let mut files = vec![
        ("man1/qcow2.1".to_owned(), main_page(table)),
        ("completions/qcow2.bash".to_owned(), bash(table)),
        ("completions/_qcow2".to_owned(), zsh(table)),
        ("completions/qcow2.fish".to_owned(), fish(table)),
    ];
    for verb in list(&table["verbs"]) {
        let name = format!("man1/qcow2-{}.1", text(&verb["name"]));
        files.push((name, verb_page(verb, text(&table["version"]))));
    }
    files
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

/// The spellings of an option, such as `-f` and `--format`.
fn spellings(option: &Value) -> Vec<String> {
    let short = option["short"].as_str().map(|letter| format!("-{letter}"));
    let long = option["long"].as_str().map(|name| format!("--{name}"));
    short.into_iter().chain(long).collect()
}

/// Escapes text for troff: no line starts with a request, and dashes stay dashes.
fn troff(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-");
    match escaped.starts_with(['.', '\'']) {
        true => format!("\\&{escaped}"),
        false => escaped,
    }
}

fn main_page(table: &Value) -> String {
    let mut page = head("QCOW2", "toolkit for qcow2 disk images", text(&table["version"]), "qcow2");
    page += ".SH SYNOPSIS\n.B qcow2\n[\\fIOPTIONS\\fR] \\fIVERB\\fR [\\fIVERB OPTIONS\\fR]\n.SH OPTIONS\n";
    push_options(&mut page, &table["options"]);
    page += ".SH VERBS\n";
    for verb in list(&table["verbs"]) {
        let (name, summary) = (troff(text(&verb["name"])), troff(text(&verb["summary"])));
        let _ = write!(page, ".TP\n.BR qcow2\\-{name} (1)\n{summary}.\n");
    }
    let _ = write!(page, ".SH LIMITS\n{}\n", troff(text(&table["limits"])));
    page + ".SH EXIT STATUS\n0 for success, 1 for a failure; \\fBcheck\\fR and \\fBcompare\\fR have more.\n"
}

fn verb_page(verb: &Value, version: &str) -> String {
    let name = text(&verb["name"]);
    let title = format!("qcow2-{name}");
    let mut page = head(&title.to_uppercase(), text(&verb["summary"]), version, &title);
    let _ = write!(
        page,
        ".SH SYNOPSIS\n.B qcow2 {}\n{}\n.SH OPTIONS\n",
        troff(name),
        troff(text(&verb["synopsis"]))
    );
    push_options(&mut page, &verb["options"]);
    if !list(&verb["operands"]).is_empty() {
        page += ".SH OPERANDS\n";
    }
    for operand in list(&verb["operands"]) {
        let _ =
            write!(page, ".TP\n.I {}\n{}\n", troff(text(&operand["name"])), troff(text(&operand["help"])));
    }
    page + ".SH SEE ALSO\n.BR qcow2 (1)\n"
}

fn head(title: &str, summary: &str, version: &str, name: &str) -> String {
    let (title, name, summary) = (troff(title), troff(name), troff(summary));
    format!(".TH {title} 1 \"\" \"qcow2 {version}\" \"User Commands\"\n.SH NAME\n{name} \\- {summary}\n")
}

fn push_options(page: &mut String, options: &Value) {
    for option in list(options) {
        let names: Vec<String> =
            spellings(option).iter().map(|name| format!("\\fB{}\\fR", troff(name))).collect();
        let value =
            option["value"].as_str().map_or_else(String::new, |value| format!(" \\fI{}\\fR", troff(value)));
        let _ = write!(page, ".TP\n{}{value}\n{}\n", names.join(", "), troff(text(&option["help"])));
    }
}

fn words(options: &Value) -> String {
    list(options).iter().flat_map(spellings).collect::<Vec<_>>().join(" ")
}

fn verb_names(table: &Value) -> String {
    list(&table["verbs"]).iter().map(|verb| text(&verb["name"])).collect::<Vec<_>>().join(" ")
}

fn bash(table: &Value) -> String {
    let mut cases = String::new();
    for verb in list(&table["verbs"]) {
        let _ = writeln!(cases, "    {}) words=\"{}\" ;;", text(&verb["name"]), words(&verb["options"]));
    }
    format!(
        "_qcow2() {{\n  local word=\"${{COMP_WORDS[COMP_CWORD]}}\" verb=\"${{COMP_WORDS[1]}}\" words\n  COMPREPLY=()\n  \
         if [ \"$COMP_CWORD\" -eq 1 ]; then\n    COMPREPLY=($(compgen -W \"{} {}\" -- \"$word\"))\n    return\n  fi\n  \
         case \"$verb\" in\n{cases}    *) words=\"\" ;;\n  esac\n  case \"$word\" in\n    \
         -*) COMPREPLY=($(compgen -W \"$words\" -- \"$word\")) ;;\n  esac\n}}\n\
         complete -o default -F _qcow2 qcow2\n",
        verb_names(table),
        words(&table["options"]),
    )
}

/// Escapes help text for zsh, inside single quotes and brackets.
fn zsh_help(help: &str) -> String {
    help.replace('\'', "'\\''").replace('[', "\\[").replace(']', "\\]").replace(':', "\\:")
}

fn zsh(table: &Value) -> String {
    let mut out = String::from("#compdef qcow2\n\n_qcow2() {\n  local -a verbs\n  verbs=(\n");
    for verb in list(&table["verbs"]) {
        let _ = writeln!(out, "    '{}:{}'", text(&verb["name"]), zsh_help(text(&verb["summary"])));
    }
    out += "  )\n  if (( CURRENT == 2 )); then\n    _describe verb verbs\n    return\n  fi\n  case \"$words[2]\" in\n";
    for verb in list(&table["verbs"]) {
        let _ = write!(out, "    {})\n      _arguments", text(&verb["name"]));
        for option in list(&verb["options"]) {
            let value =
                option["value"].as_str().map_or_else(String::new, |v| format!(":{}:_files", zsh_help(v)));
            for name in spellings(option) {
                let _ = write!(out, " \\\n        '{name}[{}]{value}'", zsh_help(text(&option["help"])));
            }
        }
        out += " \\\n        '*:file:_files'\n      ;;\n";
    }
    out + "  esac\n}\n\n_qcow2 \"$@\"\n"
}

fn fish(table: &Value) -> String {
    let quote = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let mut out = String::new();
    for verb in list(&table["verbs"]) {
        let (name, summary) = (text(&verb["name"]), quote(text(&verb["summary"])));
        let _ = writeln!(out, "complete -c qcow2 -n __fish_use_subcommand -f -a {name} -d {summary}");
        for option in list(&verb["options"]) {
            let short = option["short"].as_str().map_or_else(String::new, |letter| format!(" -s {letter}"));
            let long = option["long"].as_str().map_or_else(String::new, |name| format!(" -l {name}"));
            let value = if option["value"].is_string() { " -r" } else { "" };
            let help = quote(text(&option["help"]));
            let seen = format!("'__fish_seen_subcommand_from {name}'");
            let _ = writeln!(out, "complete -c qcow2 -n {seen}{short}{long}{value} -d {help}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn table() -> Value {
        let option = json!({"short": "f", "long": "format", "value": "FMT", "help": "it's [one]: a format"});
        let help = json!({"short": "h", "long": "help", "value": null, "help": "show help"});
        let verb = json!({"name": "info", "summary": "Show it", "synopsis": "[-f FMT] FILE",
            "options": [option], "operands": [{"name": "FILE", "help": ".an image"}]});
        json!({"version": "1", "options": [help], "verbs": [verb], "limits": "see below"})
    }

    #[test]
    fn every_verb_and_option_is_documented() {
        let files = files(&table());
        let names: Vec<&str> = files.iter().map(|(name, _)| &**name).collect();
        let expected = [
            "man1/qcow2.1",
            "completions/qcow2.bash",
            "completions/_qcow2",
            "completions/qcow2.fish",
            "man1/qcow2-info.1",
        ];
        assert_eq!(names, expected);
        assert!(files[4].1.contains("\\fB\\-f\\fR, \\fB\\-\\-format\\fR \\fIFMT\\fR\n"));
        assert!(files[0].1.contains(".SH LIMITS\nsee below\n"));
        assert!(files[4].1.contains("\\&.an image"), "no line starts with a troff request");
        assert!(files[1].1.contains("info) words=\"-f --format\" ;;"));
        assert!(files[2].1.contains("'--format[it'\\''s \\[one\\]\\: a format]:FMT:_files'"));
        assert!(files[3].1.contains("-s f -l format -r -d 'it\\'s [one]: a format'"));
    }
}
