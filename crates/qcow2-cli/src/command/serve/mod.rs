//! `serve`: images as exports for NBD clients.

mod control;
mod serving;
mod tool;

pub(crate) use tool::run_as_tool;

use crate::args::{Arguments, Objects, Opt};
use crate::failure::Failure;
use crate::numbers::parse_count;
use crate::session::Session;
use qcow2_exerciser::{OpenRequest, RequestError};
use qcow2_io::{CacheMode, path_of};
use qcow2_ops::snapshot::SnapshotName;
use qcow2_serve::export::ExportOptions;
use qcow2_serve::nbd::{Address, Listener, ServerOptions, TlsNames};
use serving::{Also, Served, Serving, Words, serve};

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
    let also = &request.also;
    if also.record.is_some() && (also.control.is_none() || images.len() > 1) {
        return Err(Failure::new("--record needs --control, and one image"));
    }
    if also.machine.is_some() && images.len() > 1 {
        return Err(Failure::new("--vhost-user-blk shows one image"));
    }
    if also.control.is_some() && request.open.image_opts {
        return Err(Failure::new("--control needs names of files, not --image-opts"));
    }
    if request.open.image_opts && request.open.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    serve(session, request.into_serving(images)?, &Own)
}

/// What the options ask for.
struct Request {
    open: OpenRequest,
    export: ExportOptions,
    server: ServerOptions,
    tls: TlsNames,
    names: Vec<String>,
    snapshot: Option<SnapshotName>,
    addresses: Vec<Address>,
    objects: Objects,
    also: Also,
}

impl Default for Request {
    fn default() -> Self {
        let mut open = OpenRequest::default();
        open.cache = CacheMode::Writeback;
        Self {
            open,
            export: ExportOptions::default(),
            server: ServerOptions::default(),
            tls: TlsNames::default(),
            names: Vec::new(),
            snapshot: None,
            addresses: Vec::new(),
            objects: Objects::default(),
            also: Also { queues: 1, ..Also::default() },
        }
    }
}

impl Request {
    fn take(&mut self, opt: Opt, value: String) -> Result<(), Failure> {
        let (open, export) = (&mut self.open, &mut self.export);
        let refused = |error: RequestError| Failure::new(error.to_string());
        match opt {
            Opt::Socket => self.addresses.push(Address::Unix(path_of(&value).into())),
            Opt::Listen => self.addresses.push(Address::parse_tcp(&value).ok_or_else(|| {
                Failure::new(format!(
                    "invalid address '{value}': HOST:PORT is expected, as in localhost:10809"
                ))
            })?),
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
            Opt::Control => self.also.control = Some(path_of(&value).into()),
            Opt::Record => self.also.record = Some(path_of(&value).into()),
            Opt::VhostUserBlk => self.also.machine = Some(path_of(&value).into()),
            Opt::Queues => self.also.queues = parse_count("number of queues", &value, 1..=64)? as u16,
            Opt::Serial => self.also.serial = value,
            Opt::TlsCredentials => self.tls.credentials = Some(value),
            Opt::TlsAuthorization => self.tls.authorization = Some(value),
            Opt::Object => self.objects.add(&value)?,
            _ => {}
        }
        Ok(())
    }

    /// What to serve: each of `images` with the same options.
    fn into_serving(self, images: Vec<String>) -> Result<Serving, Failure> {
        let addresses = Address::choose(self.addresses, self.also.machine.is_some())
            .map_err(|error| Failure::new(error.to_string()))?;
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
        let security = self.tls.server(self.objects.secrets());
        let security = security.map_err(|error| Failure::new(error.to_string()))?;
        let (server, objects) = (self.server, self.objects);
        Ok(Serving { images, server, security, addresses, objects, also: self.also })
    }
}

/// Our own words.
struct Own;

impl Words for Own {
    fn ready(&self, session: &Session, listeners: &[Listener]) -> Result<(), Failure> {
        listeners.iter().try_for_each(|listener| session.print(&format!("listening on {}\n", listener.uri())))
    }
}
