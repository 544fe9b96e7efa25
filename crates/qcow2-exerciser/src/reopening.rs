//! `reopen`: which options of an open disk may change, and the request that opens it with them.

use crate::grammar::Reopen;
use crate::request::OpenRequest;
use qcow2_blockdev::{Driver, KeyValues};
use qcow2_core::GuestDisk;

/// The disk as it is open now.
pub(crate) struct Now<'a> {
    request: &'a OpenRequest,
    /// The driver of its format.
    driver: Driver,
    /// That of its backing file, if it has one.
    backing: Option<Driver>,
    /// The options that it was opened with; of two with the same name the later one counts.
    options: KeyValues,
}

impl<'a> Now<'a> {
    /// `disk`, which was opened by `request`.
    pub(crate) fn new(request: &'a OpenRequest, disk: &dyn GuestDisk) -> Self {
        let driver = |disk: &dyn GuestDisk| match disk.as_image() {
            Some(_) => Driver::Qcow2,
            None => Driver::Raw,
        };
        let backing = disk.backing().map(|backing| driver(&**backing));
        let path = request.path.iter().filter(|_| request.image_opts);
        let texts: Vec<&str> = path.chain(&request.options).map(String::as_str).collect();
        let options = KeyValues::parse_pairs(&texts.join(","), None).unwrap_or_default();
        let named = options.pairs().iter().rfind(|pair| pair.key == "driver").map(|pair| pair.value.clone());
        let named = named.or_else(|| request.format.clone()).and_then(|name| Driver::parse(&name));
        Self { request, driver: named.unwrap_or_else(|| driver(disk)), backing, options }
    }

    /// The driver of its format, or of the protocol where there is none.
    pub(crate) fn driver(&self) -> Driver {
        self.driver
    }

    /// The value of `key`, as far as it is known.
    fn value(&self, key: &str) -> Option<String> {
        let given = self.options.pairs().iter().rfind(|pair| pair.key == key);
        if let Some(pair) = given {
            return Some(pair.value.clone());
        }
        let is_path = !self.request.image_opts;
        match key {
            "driver" => Some(self.driver.name().to_owned()),
            "file.driver" => self.value("file.filename").map(|_| Driver::File.name().to_owned()),
            "file.filename" if is_path => self.request.path.clone(),
            "backing.driver" => self.backing.map(|driver| driver.name().to_owned()),
            "backing.file.driver" => self.backing.map(|_| Driver::File.name().to_owned()),
            _ => None,
        }
    }

    /// What to do with a new value for `key`. Errors: the text after the program's name.
    fn change(&self, key: &str, value: &str) -> Result<Change, String> {
        if matches!(key, "file" | "backing") {
            return Err(format!("Cannot find device='' nor node-name='{value}'"));
        }
        if self.value(key).is_some_and(|now| now == value) {
            return Ok(Change::Nothing);
        }
        let below = |role: &str| key.strip_prefix(role).and_then(|rest| rest.strip_prefix('.'));
        let role = self.driver.child().unwrap_or_default();
        let (node, own, change) = match (below("backing").zip(self.backing), below(role)) {
            // Layers below are opened as they are.
            (Some((own, driver)), _) => (Some(driver), own, Change::Nothing),
            (None, Some(own)) if !role.is_empty() => {
                let driver = self.value(&format!("{role}.driver"));
                (driver.and_then(|name| Driver::parse(&name)), own, Change::Set)
            }
            _ => (Some(self.driver), key, Change::Set),
        };
        if !node.is_some_and(|node| node.may_change(own)) {
            return Err(format!("Cannot change the option '{}'", own.trim_start_matches("file.")));
        }
        // Whoever writes to the disk keeps writing.
        if own == "read-only" && value == "on" && change == Change::Set && !self.request.read_only {
            return Err("Read-only block node '#block000' cannot support read-write users".to_owned());
        }
        Ok(if key == "read-only" { Change::ReadOnly } else { change })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    /// Whether the disk can be written to.
    ReadOnly,
    Set,
}

/// The request for the same disk in another way. Errors: the text after the program's name.
pub(crate) fn changed(now: &Now<'_>, reopen: Reopen) -> Result<OpenRequest, String> {
    let mut new = now.request.clone();
    new.set_cache(reopen.cache.as_deref()).map_err(|error| error.to_string())?;
    if let Some(read_only) = reopen.read_only {
        new.read_only = read_only;
    }
    let list = match reopen.options.is_empty() {
        true => KeyValues::default(),
        false => {
            KeyValues::parse_pairs(&reopen.options.join(","), None).map_err(|error| error.to_string())?
        }
    };
    let keys = || list.pairs().iter().map(|pair| &*pair.key);
    if reopen.cache.is_some() && keys().any(|key| key.starts_with("cache.")) {
        return Err("Cannot set both -c and the cache options".to_owned());
    }
    if reopen.read_only.is_some() && keys().any(|key| key == "read-only") {
        return Err("Cannot set both -r/-w and 'read-only'".to_owned());
    }
    forget_replaced(&mut new.options, &list);
    // It is known how the disk is open, and the option says how it was opened first.
    keep_options(&mut new.options, &|key| key != "read-only");
    for pair in list.pairs() {
        let change = now.change(&pair.key, &pair.value)?;
        match (change, &*pair.value) {
            (Change::Nothing, _) => {}
            (Change::ReadOnly, "on" | "off") => new.read_only = pair.value == "on",
            // A value that is none is refused where the disk is opened.
            _ => new.options.push(format!("{}={}", pair.key, qcow2_blockdev::escape_commas(&pair.value))),
        }
    }
    Ok(new)
}

/// Takes those of `options` out that `list` replaces as a whole: sizes of caches which together say the same
/// in another way, and overlap checks.
fn forget_replaced(options: &mut Vec<String>, list: &KeyValues) {
    const SIZES: [&str; 3] = ["cache-size", "l2-cache-size", "refcount-cache-size"];
    let has = |key: &str| list.last(key).is_some();
    let sizes = has(SIZES[0]) || (has(SIZES[1]) && has(SIZES[2]));
    let checks = has("overlap-check") || has("overlap-check.template");
    if !sizes && !checks {
        return;
    }
    let stays = |key: &str| {
        !(sizes && SIZES.contains(&key))
            && !(checks && (key == "overlap-check" || key.starts_with("overlap-check.")))
    };
    keep_options(options, &stays);
}

/// Takes out of `options` those of which `stays` is false.
fn keep_options(options: &mut Vec<String>, stays: &dyn Fn(&str) -> bool) {
    if options.is_empty() {
        return;
    }
    let old = KeyValues::parse_pairs(&options.join(","), None).unwrap_or_default();
    let kept = old.pairs().iter().filter(|pair| stays(&pair.key));
    *options =
        kept.map(|pair| format!("{}={}", pair.key, qcow2_blockdev::escape_commas(&pair.value))).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::RawDisk;
    use qcow2_io::MemoryStorage;
    use std::sync::Arc;

    /// What becomes of the options of a disk that was opened with those of `request`.
    fn check(request: OpenRequest, options: &str, wanted: Result<&[&str], &str>) {
        let disk = RawDisk::new(Arc::new(MemoryStorage::with_len(512)), true).unwrap();
        let reopen = Reopen { read_only: None, cache: None, options: vec![options.to_owned()] };
        let new = changed(&Now::new(&request, &disk), reopen);
        let seen = new.as_ref().map(|new| new.options.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(seen.as_deref().map_err(|text| text.as_str()), wanted, "{options}");
    }

    #[test]
    fn options_that_change_and_that_stay() {
        let path = || OpenRequest { path: Some("a".to_owned()), ..OpenRequest::default() };
        check(path(), "discard=unmap,offset=512", Ok(&["discard=unmap", "offset=512"]));
        check(path(), "driver=raw,file.driver=file,file.filename=a", Ok(&[]));
        check(path(), "driver=qcow2", Err("Cannot change the option 'driver'"));
        check(path(), "file.filename=b", Err("Cannot change the option 'filename'"));
        check(path(), "file.drop-cache=off", Ok(&["file.drop-cache=off"]));
        check(path(), "file.node-name=x", Err("Cannot change the option 'node-name'"));
        check(path(), "backing.driver=raw", Err("Cannot change the option 'backing.driver'"));
        check(path(), "backing=x", Err("Cannot find device='' nor node-name='x'"));
        check(path(), "lazy-refcounts=on", Err("Cannot change the option 'lazy-refcounts'"));
        let users = "Read-only block node '#block000' cannot support read-write users";
        check(path(), "read-only=on", Err(users));
        check(OpenRequest { read_only: true, ..path() }, "read-only=off", Ok(&[]));
        let image = OpenRequest { format: Some("qcow2".to_owned()), ..path() };
        check(image, "lazy-refcounts=on,driver=qcow2", Ok(&["lazy-refcounts=on"]));
        let list = "driver=qcow2,node-name=k,file.filename=a,,b";
        let list = OpenRequest { path: Some(list.to_owned()), image_opts: true, ..OpenRequest::default() };
        check(list.clone(), "node-name=k,file.filename=a,,b", Ok(&[]));
        let sized = vec!["cache-size=1M,overlap-check.main-header=off".to_owned(), "discard=on".to_owned()];
        let sized = OpenRequest { options: sized, format: Some("qcow2".to_owned()), ..path() };
        let both = "l2-cache-size=1M,refcount-cache-size=2M";
        let header = "overlap-check.main-header=off";
        check(sized.clone(), both, Ok(&[header, "discard=on", "l2-cache-size=1M", "refcount-cache-size=2M"]));
        check(sized, "overlap-check=all", Ok(&["cache-size=1M", "discard=on", "overlap-check=all"]));
        check(list, "node-name=j", Err("Cannot change the option 'node-name'"));
    }
}
