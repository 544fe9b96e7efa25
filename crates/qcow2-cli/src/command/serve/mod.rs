//! `serve`: images as exports for NBD clients.

mod serving;

use crate::args::{Arguments, Objects, Opt};
use crate::failure::Failure;
use crate::numbers::parse_count;
use crate::session::Session;
use qcow2_exerciser::{OpenRequest, RequestError};
use qcow2_io::{CacheMode, path_of};
use qcow2_ops::snapshot::SnapshotName;
use qcow2_serve::export::ExportOptions;
use qcow2_serve::nbd::{Address, ServerOptions};
use serving::{Served, Serving, serve};

/// Runs the verb.
pub(crate) fn run(session: &Session, mut args: Arguments) -> Result<u8, Failure> {
    let verb = args.verb().name;
    let mut request = Request::default();
    while let Some(given) = args.next(session)? {
        request.take(given.opt, given.value)?;
    }
    let images = args.into_operands();
    if images.is_empty() {
        return Err(Failure::usage(verb, "Expecting at least one image file name"));
    }
    if !request.names.is_empty() && request.names.len() != images.len() {
        return Err(Failure::usage(verb, "Expecting one name for each image"));
    }
    if request.open.image_opts && request.open.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    serve(session, request.into_serving(images))
}

/// What the options ask for.
struct Request {
    open: OpenRequest,
    export: ExportOptions,
    server: ServerOptions,
    names: Vec<String>,
    snapshot: Option<SnapshotName>,
    addresses: Vec<Address>,
    objects: Objects,
}

impl Default for Request {
    fn default() -> Self {
        let mut open = OpenRequest::default();
        open.cache = CacheMode::Writeback;
        Self {
            open,
            export: ExportOptions::default(),
            server: ServerOptions::default(),
            names: Vec::new(),
            snapshot: None,
            addresses: Vec::new(),
            objects: Objects::default(),
        }
    }
}

impl Request {
    fn take(&mut self, opt: Opt, value: String) -> Result<(), Failure> {
        let (open, export) = (&mut self.open, &mut self.export);
        let refused = |error: RequestError| Failure::new(error.to_string());
        match opt {
            Opt::Socket => self.addresses.push(Address::Unix(path_of(&value).into())),
            Opt::Listen => self.addresses.push(tcp_address(&value)?),
            Opt::ReadOnly => open.read_only = true,
            Opt::ExportName => self.names.push(value),
            Opt::Description => export.description = value,
            Opt::Format => open.format = Some(value),
            Opt::ImageOpts => open.image_opts = true,
            Opt::ForceShare => open.force_share = true,
            Opt::Scratch => open.snapshot = true,
            Opt::Cache => open.set_cache(Some(&value)).map_err(refused)?,
            Opt::Discard => open.set_discard(Some(&value)).map_err(refused)?,
            Opt::Snapshot => self.snapshot = Some(super::convert::parse_snapshot(&value)?),
            Opt::BitmapContext => export.bitmaps.push(value),
            Opt::AllocationDepth => export.allocation_depth = true,
            Opt::Clients => {
                self.server.clients = parse_count("number of clients", &value, 1..=65_535)? as usize
            }
            Opt::Object => self.objects.add(&value)?,
            _ => {}
        }
        Ok(())
    }

    /// What to serve: each of `images` with the same options.
    fn into_serving(mut self, images: Vec<String>) -> Serving {
        if self.addresses.is_empty() {
            self.addresses.push(Address::Tcp { host: "127.0.0.1".to_owned(), port: 10_809 });
        }
        let single = images.len() == 1;
        let names = images.iter().map(|image| match single {
            true => String::new(),
            false => image.rsplit('/').next().unwrap_or_default().to_owned(),
        });
        let names = if self.names.is_empty() { names.collect() } else { self.names };
        let served = images.into_iter().zip(names).map(|(image, name)| {
            let (mut open, mut export) = (self.open.clone(), self.export.clone());
            (open.path, export.name) = (Some(image), name);
            Served { open, export, snapshot: self.snapshot.clone() }
        });
        let images = served.collect();
        Serving { images, server: self.server, addresses: self.addresses, objects: self.objects }
    }
}

/// Reads `HOST:PORT`; an IPv6 address stands in brackets.
fn tcp_address(text: &str) -> Result<Address, Failure> {
    let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port) = parts.ok_or_else(|| {
        Failure::new(format!("invalid address '{text}': a host, a colon and a port up to 65535 are expected"))
    })?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Ok(Address::Tcp { host: host.to_owned(), port })
}
