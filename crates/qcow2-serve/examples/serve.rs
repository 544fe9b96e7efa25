//! Serves an image in memory, and reads it as a client: `cargo run -p qcow2-serve --example serve`.
#![allow(clippy::print_stdout, reason = "a program")]

use qcow2_core::{CreateOptions, Image, ImageFormat, OpenOptions, ResolvedSource, Storage, create};
use qcow2_io::MemoryStorage;
use qcow2_nbd::blocking::{Connection, Job, Plain, Transfer, negotiate};
use qcow2_nbd::client::{Negotiation, Step};
use qcow2_nbd::proto::Command;
use qcow2_serve::export::{Export, ExportOptions};
use qcow2_serve::nbd::{Address, Listener, Server, ServerOptions};
use std::error::Error;
use std::net::TcpStream;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, None, &CreateOptions::new(64 << 20))?;
    let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "memory");
    let disk = Image::open(source, &OpenOptions::writable())?;
    let server =
        Server::new(vec![Export::new(disk.clone(), ExportOptions::default())?], ServerOptions::default());
    let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
    let (uri, listeners) = (listener.uri(), [listener]);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(&listeners));
        let written = use_it(uri.trim_start_matches("nbd://").trim_end_matches('/'));
        server.stop().stop();
        serving.join().map_err(|_| "the server panicked")??;
        println!("{uri} had a disk of 64 MiB; read back: {}", written?);
        Ok(disk.close()?)
    })
}

/// Writes a text as a client and reads it back.
fn use_it(address: &str) -> Result<String, Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    let Step::Ready(export) = negotiate(&mut stream, Negotiation::with_export(""))? else {
        return Err("no export".into());
    };
    let connection = Connection::new(Plain(stream.try_clone()?), stream, export.mode);
    let text = b"hello";
    connection.run(&mut [Job::new(Command::WRITE, 4096, 5, Transfer::Send(text))])?;
    let mut read = [0; 5];
    connection.run(&mut [Job::new(Command::READ, 4096, 5, Transfer::Receive(&mut read))])?;
    connection.disconnect();
    Ok(String::from_utf8(read.to_vec())?)
}
