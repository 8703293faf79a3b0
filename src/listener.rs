//! TCP and Unix sockets behind one type, for listening and for a connection.
//!
//! std's `TcpStream` and `UnixStream` make the same system calls on what they hold, so every connection is held as a `TcpStream`, of
//! which only the addresses of a Unix one cannot be told. The way not taken, a trait or an enum for the two, is as long as this file.

use crate::sys::{self, POLLIN};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::{net::UnixListener, net::UnixStream, prelude::*};
use std::time::{Duration, Instant};
use std::{ffi::c_short, fmt, fs, io, io::ErrorKind, path::Path, path::PathBuf, sync::Arc};

/// The longest that anything waits before it sees what else has happened. All times are kept to within a tick.
pub const TICK: Duration = Duration::from_millis(100);
/// A burst of clients waits in the backlog; beyond it they would wait a second for their SYN to be sent again.
const BACKLOG: i32 = 4096;

/// Where to listen.
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Closes its socket, and removes a Unix one's file, when it is dropped.
pub struct Listener {
    socket: TcpListener,
    /// The address, with the port that was taken where 0 was asked for.
    pub name: String,
    /// A Unix socket's file, by its path and inode.
    file: Option<(PathBuf, u64)>,
}

/// A connection. A read fails with `WouldBlock` when it would have to wait beyond the deadline, or when the server ends.
#[derive(Clone)]
pub struct Connection {
    pub socket: Arc<TcpStream>,
    /// For the log.
    pub peer: String,
    pub deadline: Instant,
}

impl Address {
    /// `IP:PORT`, `[IPv6]:PORT`, `PORT` (on 127.0.0.1) or `unix:PATH`.
    pub fn parse(text: &str) -> Result<Address, &'static str> {
        let socket = match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => return Ok(Address::Unix(path.into())),
            _ if text.contains(':') => text.parse(),
            _ => format!("127.0.0.1:{text}").parse(),
        };
        let socket = socket.map(Address::Tcp);
        socket.map_err(|_| "an address: IP:PORT, [IPv6]:PORT, PORT or unix:PATH")
    }

    /// Whether programs on other hosts can connect.
    pub fn is_exposed(&self) -> bool {
        matches!(self, Address::Tcp(address) if !address.ip().to_canonical().is_loopback())
    }
}

impl fmt::Display for Address {
    /// As the readiness line has it.
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(out, "http://{address}"),
            Address::Unix(path) => write!(out, "unix:{}", path.display()),
        }
    }
}

impl Listener {
    /// Binds to an address. A peer that is silent for `idle` and for `stall` more will be taken for dead.
    pub fn bind(address: &Address, idle: Duration, stall: Duration) -> io::Result<Listener> {
        let (mut name, mut file) = (address.to_string(), None);
        let socket = match address {
            Address::Tcp(address) => {
                let socket = TcpListener::bind(address)?;
                name = Address::Tcp(socket.local_addr()?).to_string();
                socket
            }
            Address::Unix(path) => {
                clear_stale(path)?;
                let before = sys::set_umask(0o177);
                let socket = UnixListener::bind(path);
                sys::set_umask(before);
                let made = fs::symlink_metadata(path);
                file = made.ok().map(|made| (path.clone(), made.ino()));
                OwnedFd::from(socket?).into()
            }
        };
        sys::set_options(&socket, BACKLOG, idle, stall);
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, name, file })
    }

    /// The next connection; fails with `WouldBlock` where none comes within `wait`.
    pub fn accept(&self, wait: Duration) -> io::Result<Connection> {
        sys::ready(&self.socket, POLLIN, wait);
        let socket = Arc::new(sys::accept(&self.socket)?);
        // A Unix socket has no address.
        let peer = socket.peer_addr();
        let peer = peer.map_or("unix".to_string(), |peer| peer.to_string());
        let deadline = Instant::now();
        Ok(Connection {
            socket,
            peer,
            deadline,
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, inode)) = &self.file {
            // Somebody else's by now, perhaps.
            if fs::symlink_metadata(path).is_ok_and(|file| file.ino() == *inode) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl Connection {
    /// The address that it came in on; none for a Unix socket.
    pub fn local(&self) -> Option<IpAddr> {
        let address = self.socket.local_addr().ok()?;
        Some(address.ip().to_canonical())
    }

    /// Waits until one of `events` holds; false where none does before the deadline, or before the server ends.
    pub fn wait(&self, events: c_short, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if sys::ready(&self.socket, events, left.min(TICK)) != 0 {
                return true;
            }
            if left.is_zero() || sys::signals() > 0 {
                return false;
            }
        }
    }
}

impl io::Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&*self.socket).read(buffer) {
                Err(error) if is_passing(&error) && self.wait(POLLIN, self.deadline) => {}
                other => return other,
            }
        }
    }
}

/// Whether a call on a socket failed only since it would block, or was interrupted: it may be tried again.
pub fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Makes room for a socket: takes away one that a dead server left, and nothing else.
fn clear_stale(path: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path);
    if found.is_ok_and(|file| !file.file_type().is_socket()) {
        return Err(io::Error::other("there is a file that is no socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("another server answers there")),
    }
}
