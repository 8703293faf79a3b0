//! TCP and Unix sockets behind one type, for listening and for a connection.
//!
//! std's `TcpStream` and `UnixStream` make the same system calls on what they hold, so an accepted Unix connection is held as a
//! `TcpStream`: everything after `accept` has one type to deal with and needs no trait for two.

use crate::sys;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, BufReader, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A burst of clients waits in the backlog; beyond it they would wait a second for their SYN to be sent again.
const BACKLOG: i32 = 4096;
/// Heads are small; content passes through in pieces of this size.
const INPUT_BUFFER: usize = 8 << 10;

/// `IP:PORT`, `[IPv6]:PORT`, `PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// The file of a Unix socket, removed in the end if it is still the one that was made.
pub struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

/// A connection that was accepted.
pub struct Connection {
    pub socket: TcpStream,
    /// For the log.
    pub peer: String,
    /// The address that it came in on; none for a Unix socket.
    pub local: Option<IpAddr>,
}

/// The reading side of a connection. A read fails with `TimedOut` at `deadline`, however many have succeeded before.
pub struct Input {
    connection: Arc<Connection>,
    pub deadline: Option<Instant>,
    /// Set before [`sys::interrupt`], so that the read fails instead of being taken up again.
    pub interrupted: Arc<AtomicBool>,
}

impl Address {
    pub fn parse(text: &[u8]) -> Option<Address> {
        if let Some(path) = text.strip_prefix(b"unix:") {
            return (!path.is_empty()).then(|| Address::Unix(OsStr::from_bytes(path).into()));
        }
        let text = std::str::from_utf8(text).ok()?;
        let port = || Some(SocketAddr::from((Ipv4Addr::LOCALHOST, text.parse().ok()?)));
        text.parse().ok().or_else(port).map(Address::Tcp)
    }

    /// Whether programs on other hosts can connect.
    pub fn is_exposed(&self) -> bool {
        matches!(self, Address::Tcp(address) if !address.ip().to_canonical().is_loopback())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(out, "http://{address}"),
            Address::Unix(path) => write!(out, "unix:{}", path.display()),
        }
    }
}

impl Listener {
    pub fn bind(address: &Address) -> io::Result<Listener> {
        let listener = match address {
            Address::Tcp(address) => Listener::Tcp(TcpListener::bind(address)?),
            Address::Unix(path) => {
                clear_stale(path)?;
                let listener = sys::with_private_umask(|| UnixListener::bind(path))?;
                let identity = fs::symlink_metadata(path)
                    .ok()
                    .map(|file| (file.dev(), file.ino()));
                Listener::Unix(
                    listener,
                    SocketFile {
                        path: path.clone(),
                        identity,
                    },
                )
            }
        };
        sys::set_backlog(&listener, BACKLOG);
        Ok(listener)
    }

    /// The address, with the port that was taken where 0 was asked for.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Listener::Tcp(listener) => Address::Tcp(listener.local_addr()?),
            Listener::Unix(_, file) => Address::Unix(file.path.clone()),
        })
    }

    /// The next connection, ready for use: written at once, a write given up after `tick`, a peer that acknowledges nothing for
    /// `stall` taken for dead.
    pub fn accept(&self, tick: Duration, stall: Duration) -> io::Result<Connection> {
        let connection = match self {
            Listener::Tcp(listener) => {
                let (socket, peer) = listener.accept()?;
                let local = socket.local_addr()?.ip().to_canonical();
                socket.set_nodelay(true)?;
                sys::set_user_timeout(&socket, stall);
                Connection {
                    socket,
                    peer: peer.to_string(),
                    local: Some(local),
                }
            }
            Listener::Unix(listener, _) => {
                let socket = TcpStream::from(OwnedFd::from(listener.accept()?.0));
                Connection {
                    socket,
                    peer: "unix".to_string(),
                    local: None,
                }
            }
        };
        connection.socket.set_write_timeout(Some(tick))?;
        Ok(connection)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path)
            .ok()
            .map(|file| (file.dev(), file.ino()));
        if there.is_some() && there == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Connection {
    pub fn input(connection: &Arc<Connection>) -> BufReader<Input> {
        let input = Input {
            connection: connection.clone(),
            deadline: None,
            interrupted: Arc::default(),
        };
        BufReader::with_capacity(INPUT_BUFFER, input)
    }
}

impl Input {
    /// Lets reads go on for `time` from now, altogether.
    pub fn allow(&mut self, time: Duration) {
        self.deadline = Some(Instant::now() + time);
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(io::Error::other("interrupted"));
            }
            let left = self
                .deadline
                .map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(ErrorKind::TimedOut.into());
            }
            self.connection.socket.set_read_timeout(left)?;
            match (&self.connection.socket).read(buffer) {
                // The deadline may be a moment away yet.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                other => return other,
            }
        }
    }
}

/// Makes room for a socket: takes away one that a dead server left, and nothing else.
fn clear_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(io::Error::other("there is a file that is no socket"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("another server answers there")),
    }
}
