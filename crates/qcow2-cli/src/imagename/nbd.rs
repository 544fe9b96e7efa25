//! The disks of servers: `nbd://host:port/export`, `nbd+unix:///export?socket=path`, the older
//! `nbd:host:port` and `nbd:unix:path`, and their options.

use super::options::Options;
use qcow2_io::NbdAddress;
use serde_json::Value;

/// The options that a name means. Errors: the reason.
pub(super) fn from_name(name: &str) -> Result<Options, String> {
    let mut options = Options::default();
    let mut set = |key: &str, value: &str| options.set(key, Value::String(value.to_owned()));
    if let Some((scheme, rest)) = name.split_once("://") {
        let unix = scheme == "nbd+unix";
        let url = Url::parse(rest).filter(|url| url.is_for(unix)).ok_or("No valid URL specified")?;
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
    let rest = name.strip_prefix("nbd:").ok_or("File name string for NBD must start with 'nbd:'")?;
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

/// `host:port`, `:port` or `[host]:port`. Errors: the reason.
fn host_and_port(address: &str) -> Result<(&str, &str), String> {
    let (host, port, what) = match (address.strip_prefix(':'), address.strip_prefix('[')) {
        (Some(port), _) => ("", Some(port), "port in address"),
        (None, Some(rest)) => match rest.split_once("]:") {
            Some((host, port)) => (host, Some(port), "IPv6 address"),
            None => ("", None, "IPv6 address"),
        },
        (None, None) => match address.split_once(':') {
            Some((host, port)) => (host, Some(port), "address"),
            None => ("", None, "address"),
        },
    };
    match port.filter(|port| !port.is_empty()) {
        Some(port) => Ok((host, port)),
        None => Err(format!("error parsing {what} '{address}'")),
    }
}

/// The server and the export that options mean. Errors: the reason.
pub(crate) fn server(options: &Options) -> Result<(NbdAddress, String), String> {
    let missing = |name: &str| format!("Parameter '{name}' is missing");
    let export = options.text("export").unwrap_or_default();
    let (path, host) = (options.text("path"), options.text("host"));
    if path.is_some() && host.is_some() {
        return Err("path and host may not be used at the same time".to_owned());
    }
    if options.text("tls-creds").is_some() {
        return Err("encrypted connections are not supported".to_owned());
    }
    if let Some(path) = path {
        return Ok((NbdAddress::Unix(path.into()), export));
    }
    if let Some(host) = host {
        let port = options.text("port").unwrap_or_else(|| DEFAULT_PORT.to_owned());
        return Ok((NbdAddress::Tcp { host, port }, export));
    }
    let Some(kind) = options.text("server.type") else {
        let any = options.iter().any(|(key, _)| key.starts_with("server."));
        return Err(if any { missing("type") } else { "NBD server address missing".to_owned() });
    };
    let part = |key: &str| options.text(&format!("server.{key}")).ok_or_else(|| missing(key));
    let address = match &*kind {
        "unix" => NbdAddress::Unix(part("path")?.into()),
        "inet" => NbdAddress::Tcp { host: part("host")?, port: part("port")? },
        other => return Err(format!("Parameter 'type' does not accept value '{other}'")),
    };
    Ok((address, export))
}

/// The shortest name of a server's disk.
pub(super) fn name(options: &Options) -> Option<String> {
    let (address, export) = server(options).ok()?;
    Some(match address {
        NbdAddress::Unix(path) if export.is_empty() => format!("nbd+unix://?socket={}", path.display()),
        NbdAddress::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
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
        let seen = seen.map(|(address, export)| format!("{address} {export}")).unwrap_or_else(|e| e);
        assert_eq!(seen, expected, "{name}");
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
        check("nbd::", "error parsing port in address ':'");
        check("nbd:unix:/a:exportname=", "NBD server address missing");
        check("nbd+unix:///x?socket=/a&socket=/b", "/b x");
        check("nbd:", "NBD server address missing");
        check("nbd:x", "error parsing address 'x'");
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
            check(bad, "No valid URL specified");
        }
    }
}
