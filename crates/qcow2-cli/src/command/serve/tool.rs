//! The program under the name qemu-nbd.

use super::serving::{Also, Served, Serving, Words, serve};
use crate::args::{Objects, print_version};
use crate::command::convert::parse_snapshot;
use crate::exit;
use crate::failure::Failure;
use crate::session::Session;
use crate::trace;
use qcow2_exerciser::OpenRequest;
use qcow2_serve::export::ExportError;
use qcow2_serve::nbd::{ListenError, Listener, SecurityError, list};
use qcow2_serve::tool::{self, Asked, Command, Early, Process, Stopped};

/// Runs the tool.
pub(crate) fn run_as_tool(session: &Session, args: Vec<String>) -> Result<u8, Failure> {
    let mut objects = Objects::default();
    let asked = tool::parse(session.called(), args, |early| match early {
        Early::Object(text) => objects.add(text),
        Early::Trace(text) if trace::accept(session, text)? => Err(Failure::silent(exit::SUCCESS)),
        _ => Ok(()),
    });
    let asked = match asked {
        Ok(Command::Serve(asked)) => *asked,
        Ok(Command::Version) => return print_version(session).map(|()| exit::SUCCESS),
        Ok(Command::List(asked)) => {
            let tls = asked.tls.client(objects.secrets()).map_err(no_tls)?;
            let exports =
                list(&asked.address, tls.as_ref()).map_err(|error| Failure::new(tool::not_listed(&error)))?;
            return session.print(&tool::listing(&exports)).map(|()| exit::SUCCESS);
        }
        Ok(_) => return session.print(&tool::help()).map(|()| exit::SUCCESS),
        Err(Stopped::Early(failure)) => return Err(failure),
        Err(Stopped::Refused(refusal)) => {
            refusal.complaint.iter().for_each(|line| session.complain(line));
            return Err(refusal.hint.into_iter().fold(Failure::new(refusal.text), Failure::hint));
        }
    };
    let words = Tool(asked.process.clone());
    let serving = serving(asked, objects)?;
    if let Some(code) = words.0.start(session.called()).map_err(Failure::new)? {
        return Ok(code);
    }
    serve(session, serving, &words)
}

fn serving(asked: Asked, objects: Objects) -> Result<Serving, Failure> {
    let mut open = OpenRequest::default();
    let security = asked.tls.server(objects.secrets()).map_err(no_tls)?;
    (open.path, open.image_opts, open.format) = (Some(asked.image), asked.image_opts, asked.format);
    (open.read_only, open.snapshot, open.discards) = (asked.read_only, asked.scratch, asked.discards);
    let set = open.set_cache(Some(&asked.cache)).and_then(|()| open.set_aio(Some(&asked.aio)));
    set.map_err(|error| Failure::new(error.to_string()))?;
    let snapshot = asked.snapshot.map(|text| {
        let message = format!("Failed in parsing snapshot param `{text}'");
        parse_snapshot(&text).map_err(|failure| failure.with_message(message))
    });
    let images = vec![Served { open, export: asked.export, snapshot: snapshot.transpose()? }];
    let also = Also::default();
    Ok(Serving { images, server: asked.server, security, addresses: vec![asked.address], objects, also })
}

fn no_tls(error: SecurityError) -> Failure {
    Failure::new(tool::no_tls(&error))
}

/// qemu-nbd's words.
struct Tool(Process);

impl Words for Tool {
    fn not_bound(&self, error: &ListenError) -> Failure {
        Failure::new(tool::not_bound(error))
    }

    fn not_opened(&self, image: &str, failure: Failure) -> Failure {
        failure.without_name().after_words(&format!("Failed to blk_new_open '{image}': "))
    }

    fn not_loaded(&self, image: &str, failure: Failure, missing: bool) -> Failure {
        match missing {
            true => Failure::new("Failed to load snapshot: Can't find snapshot"),
            false => self.not_opened(image, failure),
        }
    }

    fn no_export(&self, error: ExportError) -> Failure {
        Failure::new(tool::no_export(&error))
    }

    fn ready(&self, _session: &Session, _listeners: &[Listener]) -> Result<(), Failure> {
        self.0.announce().map_err(Failure::new)
    }
}
