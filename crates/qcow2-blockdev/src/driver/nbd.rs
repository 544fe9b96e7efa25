//! The disks of servers: `nbd://host:port/export`, `nbd+unix:///export?socket=path`, the older
//! `nbd:host:port` and `nbd:unix:path`, and their options.

use crate::keys::{Secrets, TlsEndpoint};
use crate::tree::{Options, Scalar};
use qcow2_io::{NbdAddress, NbdOptions, NbdTls, path_of, text_of_name};
use std::fmt;
use std::time::Duration;

/// Why a name or options lead to no server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressError {
    /// Not a URL of the kinds that are known.
    NotAUrl,
    /// A name that begins otherwise than with `nbd`.
    NotNbd,
    /// A part of an address that cannot be read.
    Unreadable {
        /// Which part.
        part: AddressPart,
        /// The whole address.
        address: String,
    },
    /// Both a socket's path and a host are given.
    PathAndHost,
    /// There are no credentials of this name.
    NoCredentials(String),
    /// The object of this name is something else than credentials.
    NotCredentials(String),
    /// The credentials are a server's.
    NotForClients,
    /// The credentials ask for algorithms (`priority`), which cannot be chosen.
    Priority(String),
    /// The address has no part of this name.
    Missing(&'static str),
    /// There is no address.
    NoServer,
    /// A kind of address that is not known.
    UnknownType(String),
}

/// A part of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressPart {
    /// What follows the last colon.
    Port,
    /// What stands in brackets.
    Ipv6,
    /// All of it.
    Whole,
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAUrl => f.write_str("the name of the server is not a known kind of URL"),
            Self::NotNbd => f.write_str("the name of a server's disk begins with 'nbd'"),
            Self::Unreadable { part, address } => {
                let part = match part {
                    AddressPart::Port => "the port",
                    AddressPart::Ipv6 => "the IPv6 address",
                    AddressPart::Whole => "host and port",
                };
                write!(f, "{part} cannot be read in the address '{address}'")
            }
            Self::PathAndHost => f.write_str("the server has both a path and a host"),
            Self::NoCredentials(id) => write!(f, "there are no TLS credentials '{id}'"),
            Self::NotCredentials(id) => write!(f, "the object '{id}' is not TLS credentials"),
            Self::NotForClients => f.write_str("the TLS credentials are a server's, not a client's"),
            Self::Priority(priority) => {
                write!(f, "the TLS priority '{priority}' is not supported, only NORMAL is")
            }
            Self::Missing(part) => write!(f, "the address of the server lacks '{part}'"),
            Self::NoServer => f.write_str("the address of the server is missing"),
            Self::UnknownType(kind) => write!(f, "a server's address is of type unix or inet, not '{kind}'"),
        }
    }
}

impl std::error::Error for AddressError {}

/// The options that a name means.
pub(crate) fn from_name(name: &str) -> Result<Options, AddressError> {
    let mut options = Options::default();
    let mut set = |key: &str, value: &str| options.set(key, Scalar::text(value));
    if let Some((scheme, rest)) = name.split_once("://") {
        let unix = scheme == "nbd+unix";
        let url = Url::parse(rest).filter(|url| url.is_for(unix)).ok_or(AddressError::NotAUrl)?;
        if unix {
            set("server.type", "unix");
            set("server.path", &url.socket.unwrap_or_default());
        } else {
            set("server.type", "inet");
            set("server.host", &url.host);
            set("server.port", url.port.as_deref().unwrap_or(DEFAULT_PORT));
        }
        if !url.export.is_empty() {
            set("export", &url.export);
        }
        return Ok(options);
    }
    let rest = name.strip_prefix("nbd:").ok_or(AddressError::NotNbd)?;
    let (address, export) = match rest.split_once(":exportname=") {
        // As in QEMU, a name that is not there takes the server with it.
        Some((_, "")) => return Ok(options),
        Some((address, export)) => (address, Some(export)),
        None => (rest, None),
    };
    if address.is_empty() {
        return Ok(options);
    }
    if let Some(export) = export {
        set("export", export);
    }
    if let Some(path) = address.strip_prefix("unix:") {
        set("server.type", "unix");
        set("server.path", path);
        return Ok(options);
    }
    let (host, port) = host_and_port(address)?;
    set("server.type", "inet");
    set("server.host", host);
    set("server.port", port);
    Ok(options)
}

/// `host:port`, `:port` or `[host]:port`.
fn host_and_port(address: &str) -> Result<(&str, &str), AddressError> {
    let (host, port, part) = match (address.strip_prefix(':'), address.strip_prefix('[')) {
        (Some(port), _) => ("", Some(port), AddressPart::Port),
        (None, Some(rest)) => match rest.split_once("]:") {
            Some((host, port)) => (host, Some(port), AddressPart::Ipv6),
            None => ("", None, AddressPart::Ipv6),
        },
        (None, None) => match address.split_once(':') {
            Some((host, port)) => (host, Some(port), AddressPart::Whole),
            None => ("", None, AddressPart::Whole),
        },
    };
    match port.filter(|port| !port.is_empty()) {
        Some(port) => Ok((host, port)),
        None => Err(AddressError::Unreadable { part, address: address.to_owned() }),
    }
}

/// The server and the export that options mean.
pub(crate) fn server(options: &Options) -> Result<(NbdAddress, String), AddressError> {
    let export = options.text("export").unwrap_or_default();
    let (path, host) = (options.text("path"), options.text("host"));
    if path.is_some() && host.is_some() {
        return Err(AddressError::PathAndHost);
    }
    if let Some(path) = path {
        return Ok((NbdAddress::Unix(path_of(&path).into_owned()), export));
    }
    if let Some(host) = host {
        let port = options.text("port").unwrap_or_else(|| DEFAULT_PORT.to_owned());
        return Ok((NbdAddress::Tcp { host, port }, export));
    }
    let Some(kind) = options.text("server.type") else {
        let any = options.iter().any(|(key, _)| key.starts_with("server."));
        return Err(if any { AddressError::Missing("type") } else { AddressError::NoServer });
    };
    let part = |key: &'static str| options.text(&format!("server.{key}")).ok_or(AddressError::Missing(key));
    let address = match &*kind {
        "unix" => NbdAddress::Unix(path_of(&part("path")?).into_owned()),
        "inet" => NbdAddress::Tcp { host: part("host")?, port: part("port")? },
        _ => return Err(AddressError::UnknownType(kind)),
    };
    Ok((address, export))
}

/// The server that options mean, and how it is used: with what name, and how long it is tried to reach it.
/// `secrets` have the credentials that options name.
pub(crate) fn connection(
    options: &Options,
    secrets: &Secrets,
) -> Result<(NbdAddress, NbdOptions), AddressError> {
    let (address, export) = server(options)?;
    let mut how = NbdOptions::default();
    let seconds = |key| options.text(key).and_then(|text| text.parse().ok()).map(Duration::from_secs);
    (how.export, how.context) = (export, options.text("x-dirty-bitmap"));
    how.reconnect_delay = seconds("reconnect-delay").unwrap_or_default();
    how.open_timeout = seconds("open-timeout").unwrap_or_default();
    how.tls = options.text("tls-creds").map(|id| credentials(&id, secrets)).transpose()?;
    if let Some(tls) = &mut how.tls {
        tls.hostname = options.text("tls-hostname");
    }
    Ok((address, how))
}

fn credentials(id: &str, secrets: &Secrets) -> Result<NbdTls, AddressError> {
    let Some(object) = secrets.tls(id) else {
        return Err(match secrets.secret(id) {
            Some(_) => AddressError::NotCredentials(id.to_owned()),
            None => AddressError::NoCredentials(id.to_owned()),
        });
    };
    match (object.endpoint, object.other_priority()) {
        (TlsEndpoint::Server, _) => Err(AddressError::NotForClients),
        (_, Some(priority)) => Err(AddressError::Priority(priority.to_owned())),
        _ => Ok(NbdTls::new(object.credentials.clone())),
    }
}

/// The shortest name of a server's disk.
pub(crate) fn name(options: &Options) -> Option<String> {
    let (address, export) = server(options).ok()?;
    Some(match address {
        NbdAddress::Unix(path) if export.is_empty() => {
            format!("nbd+unix://?socket={}", text_of_name(path.as_os_str()))
        }
        NbdAddress::Unix(path) => format!("nbd+unix:///{export}?socket={}", text_of_name(path.as_os_str())),
        NbdAddress::Tcp { host, port } if export.is_empty() => format!("nbd://{host}:{port}"),
        NbdAddress::Tcp { host, port } => format!("nbd://{host}:{port}/{export}"),
        _ => return None,
    })
}

struct Url {
    host: String,
    port: Option<String>,
    export: String,
    socket: Option<String>,
}

impl Url {
    /// What follows `://`: `host:port/export?socket=path`.
    fn parse(text: &str) -> Option<Self> {
        let (text, query) = text.split_once('?').unwrap_or((text, ""));
        let (server, export) = text.split_once('/').unwrap_or((text, ""));
        let server = server.split_once('@').map_or(server, |(_, server)| server);
        if server.starts_with('[') != server.contains(']') {
            return None;
        }
        let (host, port) = match server.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port)),
            _ => (server, None),
        };
        if port.is_some_and(|port| !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err())
        {
            return None;
        }
        let port = port.filter(|port| port.bytes().any(|b| b != b'0'));
        let mut socket = None;
        for item in query.split('&').filter(|item| !item.is_empty()) {
            socket = Some(item.strip_prefix("socket=")?);
        }
        Some(Self {
            host: decoded(host.trim_start_matches('[').trim_end_matches(']'))?,
            port: port.map(str::to_owned),
            export: decoded(export)?,
            socket: match socket {
                Some(socket) => Some(decoded(socket)?),
                None => None,
            },
        })
    }

    fn is_for(&self, unix: bool) -> bool {
        match unix {
            true => self.host.is_empty() && self.port.is_none() && self.socket.is_some(),
            false => !self.host.is_empty() && self.socket.is_none(),
        }
    }
}

/// `%41` becomes `A`.
fn decoded(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.bytes());
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| (byte as char).to_digit(16);
        let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).ok()
}

const DEFAULT_PORT: &str = "10809";

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, expected: &str) {
        let seen = from_name(name).and_then(|options| server(&options));
        let seen = seen.map(|(address, export)| format!("{address} {export}"));
        assert_eq!(seen.as_deref(), Ok(expected), "{name}");
    }

    fn refused(name: &str, expected: AddressError) {
        let seen = from_name(name).and_then(|options| server(&options)).map(|_| ());
        assert_eq!(seen, Err(expected), "{name}");
    }

    fn unreadable(part: AddressPart, address: &str) -> AddressError {
        AddressError::Unreadable { part, address: address.to_owned() }
    }

    #[test]
    fn names_of_servers() {
        check("nbd://host/x", "host:10809 x");
        check("nbd+tcp://host:99", "host:99 ");
        check("nbd://[::1]:99/a%20b", "::1:99 a b");
        check("nbd+unix:///x/y?socket=/a", "/a x/y");
        check("nbd+unix://?socket=a", "a ");
        check("nbd:unix:/a", "/a ");
        check("nbd:unix:/a:exportname=b", "/a b");
        check("nbd:h:1:exportname=b", "h:1 b");
        check("nbd://user@host:0/x", "host:10809 x");
        check("nbd:[::1]:1", "::1:1 ");
        check("nbd:::", ":: ");
        refused("nbd::", unreadable(AddressPart::Port, ":"));
        refused("nbd:unix:/a:exportname=", AddressError::NoServer);
        check("nbd+unix:///x?socket=/a&socket=/b", "/b x");
        refused("nbd:", AddressError::NoServer);
        refused("nbd:x", unreadable(AddressPart::Whole, "x"));
        for bad in [
            "nbd://",
            "nbd://x:y/z",
            "nbd+unix://",
            "nbd+unix:///x",
            "nbd+unix:///x?foo=1",
            "nbd://%zz",
            "nbd://h:99999",
            "nbd://[::1/",
            "nbd://h/x?a=b",
        ] {
            refused(bad, AddressError::NotAUrl);
        }
    }
}
