//! TCP and Unix sockets behind one type, for listening and for a connection.
//!
//! std's `TcpStream` and `UnixStream` make the same system calls on what they hold, so every connection is held as a `TcpStream`, of
//! which only the addresses of a Unix one cannot be told. The way not taken, a trait or an enum for the two, is as long as this file.

use crate::sys;
use std::os::unix::{net::UnixListener, net::UnixStream, prelude::*};
use std::path::{Path, PathBuf};
use std::sync::{Arc, atomic::AtomicBool, atomic::Ordering};
use std::time::{Duration, Instant};
use std::{fs, io, net};

/// A burst of clients waits in the backlog; beyond it they would wait a second for their SYN to be sent again.
const BACKLOG: i32 = 4096;
/// Heads are small; content passes through in pieces of this size.
const INPUT_BUFFER: usize = 4 << 10;

/// Where to listen.
pub enum Address {
    Tcp(net::SocketAddr),
    Unix(PathBuf),
}

pub struct Listener {
    pub socket: OwnedFd,
    /// The address, with the port that was taken where 0 was asked for.
    pub name: String,
    /// A Unix socket's file, by its path, device and inode.
    file: Option<(PathBuf, u64, u64)>,
}

pub struct Connection {
    pub socket: net::TcpStream,
    /// For the log.
    pub peer: String,
    /// The address that it came in on; none for a Unix socket.
    pub local: Option<net::IpAddr>,
}

/// The reading side of a connection. A read fails with `TimedOut` at `deadline`, however many have succeeded before.
pub struct Input {
    connection: Arc<Connection>,
    pub deadline: Option<Instant>,
    /// Set before [`sys::interrupt`], so that the read fails instead of being taken up again.
    pub interrupted: Arc<AtomicBool>,
}

impl Address {
    /// `IP:PORT`, `[IPv6]:PORT`, `PORT` (on 127.0.0.1) or `unix:PATH`.
    pub fn parse(text: &str) -> Option<Address> {
        match text.strip_prefix("unix:") {
            Some("") => None,
            Some(path) => Some(Address::Unix(path.into())),
            None if text.contains(':') => text.parse().ok().map(Address::Tcp),
            None => {
                let port: u16 = text.parse().ok()?;
                Some(Address::Tcp((net::Ipv4Addr::LOCALHOST, port).into()))
            }
        }
    }

    /// As the readiness line has it.
    pub fn name(&self) -> String {
        match self {
            Address::Tcp(address) => format!("http://{address}"),
            Address::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// Whether programs on other hosts can connect.
    pub fn is_exposed(&self) -> bool {
        matches!(self, Address::Tcp(address) if !address.ip().to_canonical().is_loopback())
    }
}

impl Listener {
    pub fn bind(address: &Address) -> io::Result<Listener> {
        let mut file = None;
        let (socket, name) = match address {
            Address::Tcp(address) => {
                let socket = net::TcpListener::bind(address)?;
                let name = Address::Tcp(socket.local_addr()?).name();
                (OwnedFd::from(socket), name)
            }
            Address::Unix(path) => {
                clear_stale(path)?;
                let socket = sys::with_private_umask(|| UnixListener::bind(path))?;
                let made = fs::symlink_metadata(path)?;
                file = Some((path.clone(), made.dev(), made.ino()));
                (socket.into(), address.name())
            }
        };
        sys::set_backlog(&socket, BACKLOG);
        Ok(Listener { socket, name, file })
    }

    /// The next connection, ready for use: written at once, a write given up after `tick`, a peer that acknowledges nothing for
    /// `stall` taken for dead.
    pub fn accept(&self, tick: Duration, stall: Duration) -> io::Result<Connection> {
        let socket = net::TcpStream::from(sys::accept(&self.socket)?);
        socket.set_write_timeout(Some(tick))?;
        let (mut peer, mut local) = ("unix".to_string(), None);
        if self.file.is_none() {
            socket.set_nodelay(true)?;
            sys::set_user_timeout(&socket, stall);
            peer = socket.peer_addr()?.to_string();
            local = Some(socket.local_addr()?.ip().to_canonical());
        }
        Ok(Connection {
            socket,
            peer,
            local,
        })
    }
}

impl Drop for Listener {
    /// Removes the socket's file, if it is still the one that was made.
    fn drop(&mut self) {
        if let Some((path, device, inode)) = &self.file {
            let same = |file: fs::Metadata| file.dev() == *device && file.ino() == *inode;
            if fs::symlink_metadata(path).is_ok_and(same) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl Input {
    pub fn new(connection: Arc<Connection>) -> io::BufReader<Input> {
        let input = Input {
            connection,
            deadline: None,
            interrupted: Arc::default(),
        };
        io::BufReader::with_capacity(INPUT_BUFFER, input)
    }

    /// Lets reads go on for `time` from now, altogether.
    pub fn allow(&mut self, time: Duration) {
        self.deadline = Some(Instant::now() + time);
    }
}

impl io::Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use io::ErrorKind::{Interrupted, Other, TimedOut, WouldBlock};
        let mut socket = &self.connection.socket;
        loop {
            let left = self
                .deadline
                .map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(TimedOut.into());
            }
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(Other.into());
            }
            socket.set_read_timeout(left)?;
            match socket.read(buffer) {
                // The deadline may be a moment away yet.
                Err(error) if matches!(error.kind(), Interrupted | WouldBlock) => {}
                other => return other,
            }
        }
    }
}

/// Makes room for a socket: takes away one that a dead server left, and nothing else.
fn clear_stale(path: &Path) -> io::Result<()> {
    let Ok(file) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !file.file_type().is_socket() {
        return Err(io::Error::other("there is a file that is no socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("another server answers there")),
    }
}
