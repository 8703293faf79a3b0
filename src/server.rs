//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::{Child, Feed, thread_builder};
use crate::config::Config;
use crate::listener::{Connection, Listener};
use crate::log::{self, Quoted};
use crate::output::{Format, Stream};
use crate::policy::Order;
use crate::request::{Incoming, Refusal, Request, form_value};
use crate::response::{self, Answer, CONTINUE, PAGE_METHODS, RUN_METHODS, Reply};
use crate::run::{self, TICK};
use crate::sys;
use std::fs::File;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// In which a head must have arrived whole, and a form; however it trickles.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a connection waits for its next request.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Content that nobody asked for is read up to here, so that the connection can go on.
const MOST_SKIPPED: u64 = 1 << 20;
const LARGEST_FORM: u64 = 64 << 10;
/// How long a client that was refused may go on sending before its connection is closed on it, and how long it may pause.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_PAUSE: Duration = Duration::from_secs(2);
/// `accept` fails at once as long as descriptors are out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What the server's end may take beyond `--grace`, and after a second signal.
const AFTER_GRACE: Duration = Duration::from_millis(900);
const AFTER_SECOND_SIGNAL: Duration = Duration::from_millis(400);
/// Connections that wait to be turned away, and for their clients to have read so.
const MOST_PARTING: usize = 256;

const NO_PLACE: Refusal = Refusal::Busy("no place for another connection");

struct Server {
    config: Config,
    /// Standard input of commands without content.
    null: File,
    /// Commands that are about to start, or have not ended.
    runs: AtomicUsize,
}

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: &Listener, config: Config) -> io::Result<()> {
    let null = File::open("/dev/null")?;
    let server = Arc::new(Server {
        config,
        null,
        runs: AtomicUsize::new(0),
    });
    let (refused, to_refuse) = sync_channel(MOST_PARTING);
    thread_builder().spawn(move || turn_away(&to_refuse))?;
    accept_connections(&server, listener, &refused);
    log::line(format_args!("shutdown"));
    server.wait_for_runs();
    Ok(())
}

fn accept_connections(
    server: &Arc<Server>,
    listener: &Listener,
    refused: &SyncSender<Arc<Connection>>,
) {
    let spare = || server.null.try_clone().ok();
    // Given up when descriptors are out, so that a client more can be told so.
    let mut reserve = spare();
    while sys::signals() == 0 {
        let Ok(connection) = listener.accept(TICK, server.config.limits.stall) else {
            if reserve.take().is_none() {
                thread::sleep(ACCEPT_PAUSE);
                reserve = spare();
            }
            continue;
        };
        reserve = reserve.or_else(spare);
        let connection = Arc::new(connection);
        if !server.converse_in_thread(connection.clone()) {
            log_refusal(&connection, "", &NO_PLACE);
            // A flood that outruns the thread that turns away is cut off.
            let _ = refused.try_send(connection);
        }
    }
}

/// Tells clients that there is no place for them, and keeps each connection until its client has read so, or long enough.
fn turn_away(refused: &Receiver<Arc<Connection>>) {
    let mut parting: Vec<(Instant, Arc<Connection>)> = Vec::new();
    loop {
        let patience = if parting.is_empty() {
            LINGER
        } else {
            ACCEPT_PAUSE
        };
        match refused.recv_timeout(patience) {
            Ok(connection) => {
                let answer = Answer {
                    close: true,
                    head_only: false,
                    foreign_origin: None,
                };
                let _ = connection.socket.set_nonblocking(true);
                let _ = (&connection.socket).write(&answer.render(&NO_PLACE.into()));
                let _ = connection.socket.shutdown(Shutdown::Write);
                parting.truncate(MOST_PARTING);
                parting.push((Instant::now(), connection));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        parting.retain(|(since, connection)| {
            let open = match (&connection.socket).read(&mut [0; 4096]) {
                Ok(length) => length > 0,
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            };
            open && since.elapsed() < LINGER_PAUSE
        });
    }
}

impl Server {
    /// Serves a connection in a thread of its own, if there may be one more and the thread can be had.
    fn converse_in_thread(self: &Arc<Server>, connection: Arc<Connection>) -> bool {
        // Each connection's thread holds the server, as does the accepting one.
        let room = Arc::strong_count(self) <= self.config.max_connections;
        let server = self.clone();
        room && thread_builder()
            .spawn(move || server.converse(connection))
            .is_ok()
    }

    /// The requests of a connection, one after the other.
    fn converse(&self, connection: Arc<Connection>) {
        let mut incoming = Incoming::new(Connection::input(&connection));
        incoming.input.get_mut().allow(REQUEST_TIME);
        while let Some(mut next) = self.exchange(&connection, incoming) {
            next.input.get_mut().allow(IDLE_TIME);
            if next.input.fill_buf().map_or(true, <[u8]>::is_empty) {
                return;
            }
            next.input.get_mut().allow(REQUEST_TIME);
            incoming = next;
        }
    }

    /// A request and its answer. Gives back what another request may follow in.
    fn exchange(&self, connection: &Connection, incoming: Feed) -> Option<Feed> {
        let mut request = Request::default();
        let mut incoming = Some(incoming);
        let checked = self.check(connection, &mut request, incoming.as_mut()?);
        let done = checked.and_then(|order| self.run(connection, &request, &order, &mut incoming));
        let mut close = request.wants_close() || sys::signals() > 0;
        if let Err(reply) = done {
            // Whether a client that was not told to go on sends its content all the same cannot be known.
            let ignored = |feed: &Feed| feed.awaits_continue || feed.known_length() > MOST_SKIPPED;
            close |= reply.breaks_framing() || incoming.as_ref().is_none_or(ignored);
            match &reply {
                Reply::Refusal(Refusal::Gone) => return None,
                Reply::Refusal(refusal) => log_refusal(connection, &request.target, refusal),
                _ => {}
            }
            let answer = self.answer(&request, close).render(&reply);
            self.write(connection, &answer).ok()?;
        }
        let goes_on = incoming.filter(|_| !close).and_then(skip_content);
        if goes_on.is_none() {
            linger(&connection.socket);
        }
        goes_on
    }

    /// Reads a request and checks it, in the order in which refusals take precedence. What asks for no command is answered at once.
    fn check(
        &self,
        connection: &Connection,
        request: &mut Request,
        incoming: &mut Feed,
    ) -> Result<Order, Reply> {
        let policy = &self.config.policy;
        incoming.read_head(request)?;
        if incoming.begins_malformed(incoming.input.buffer()) {
            return Err(Refusal::Malformed("malformed chunk").into());
        }
        policy.host(request, connection.local)?;
        let (path, method) = (request.path.as_str(), request.method.as_str());
        if path != "/" || !matches!(method, "GET" | "HEAD") {
            policy.browser(request)?;
        }
        let methods = match path {
            "/" => PAGE_METHODS,
            "/run" | "*" => RUN_METHODS,
            _ => return Err(Refusal::NoSuchPath.into()),
        };
        match (path, method) {
            (_, "OPTIONS") => return Err(Reply::Options(methods)),
            ("/", "GET" | "HEAD") => return Err(Reply::Page),
            ("/run", "GET" | "HEAD" | "POST") => {}
            (_, "GET" | "HEAD" | "POST") => return Err(Refusal::Method(methods).into()),
            _ => return Err(Refusal::UnknownMethod.into()),
        }
        policy.token(request)?;
        if !request.all("last-event-id").is_empty() {
            return Err(Refusal::Repeated.into());
        }
        let query = request.query.as_bytes();
        let in_content = method == "POST" && form_value(query, b"command")?.is_none();
        let order = match in_content {
            true => policy.command(&self.read_form(connection, incoming)?)?,
            false => policy.command(query)?,
        };
        if method == "HEAD" {
            Err(Reply::Head(format_for(request)))
        } else {
            Ok(order)
        }
    }

    /// Content that is a form.
    fn read_form(&self, connection: &Connection, incoming: &mut Feed) -> Result<Vec<u8>, Refusal> {
        let mut form = Vec::new();
        if incoming.known_length() <= LARGEST_FORM && std::mem::take(&mut incoming.awaits_continue)
        {
            self.write(connection, CONTINUE)
                .map_err(|_| Refusal::Gone)?;
        }
        incoming.input.get_mut().allow(REQUEST_TIME);
        while form.len() as u64 + incoming.known_length() <= LARGEST_FORM {
            let piece = incoming.piece()?;
            if piece.is_empty() {
                return Ok(form);
            }
            form.extend_from_slice(piece);
            let length = piece.len();
            incoming.take(length);
        }
        Err(Refusal::FormTooLarge)
    }

    /// Runs a command and streams it. Content, if there is any, is its standard input.
    fn run(
        &self,
        connection: &Connection,
        request: &Request,
        order: &Order,
        incoming: &mut Option<Feed>,
    ) -> Result<(), Reply> {
        // Counted before the signals are looked at: a server that ends sees the count, or this sees that it ends.
        let _counted = Counted::new(&self.runs);
        if sys::signals() > 0 {
            return Err(Refusal::Busy("the server is shutting down").into());
        }
        let format = format_for(request);
        let fed = |feed: &Feed| request.method == "POST" && !feed.is_at_end();
        let awaits_continue = incoming.as_ref().is_some_and(|feed| feed.awaits_continue);
        let mut feed = incoming.take_if(|feed| fed(feed));
        let child = Child::start(&order.words, &self.null, &mut feed);
        *incoming = feed.or(incoming.take());
        let child = child.map_err(|refusal| failure(connection, refusal, format))?;
        let (peer, pid) = (&connection.peer, child.pid());
        log::line(format_args!(
            "run peer={peer} pid={pid} command={}",
            Quoted(&order.line)
        ));
        let mut head = if awaits_continue {
            CONTINUE.to_vec()
        } else {
            Vec::new()
        };
        head.extend(self.answer(request, request.wants_close()).stream(format));
        let (complete, feed) = run::run(
            child,
            connection,
            &self.config.limits,
            Stream::new(format, head),
        );
        *incoming = incoming.take().or(feed);
        if complete {
            Ok(())
        } else {
            Err(Refusal::Gone.into())
        }
    }

    fn answer<'a>(&self, request: &'a Request, close: bool) -> Answer<'a> {
        let foreign_origin = self.config.policy.foreign_origin(request);
        Answer {
            close,
            head_only: request.method == "HEAD",
            foreign_origin,
        }
    }

    /// Writes an answer whole, unless the client is gone or does not read.
    fn write(&self, connection: &Connection, mut bytes: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + self.config.limits.stall;
        while !bytes.is_empty() {
            match (&connection.socket).write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits for the commands to end, which they do by themselves once a signal has come.
    fn wait_for_runs(&self) {
        let mut deadline = Instant::now() + self.config.limits.grace + AFTER_GRACE;
        while self.runs.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            if sys::signals() > 1 {
                deadline = deadline.min(Instant::now() + AFTER_SECOND_SIGNAL);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Events, unless plain text is asked for and they are not (RFC 9110 section 12.5.1).
fn format_for(request: &Request) -> Format {
    let plain =
        request.lists("accept", "text/plain") && !request.lists("accept", "text/event-stream");
    Format {
        events: !plain,
        chunked: request.minor > 0,
    }
}

/// A command that could not be started is an event stream that says so, where no status can.
fn failure(connection: &Connection, refusal: Refusal, format: Format) -> Reply {
    let (code, why) = match refusal {
        Refusal::NoProgram(why) if format.events => (127, why),
        Refusal::CannotRun(why) if format.events => (126, why),
        other => return other.into(),
    };
    let (peer, quoted) = (&connection.peer, Quoted(why.as_bytes()));
    log::line(format_args!(
        "exit peer={peer} out=failed code={code} why={quoted}"
    ));
    Reply::Failed(format, code, why)
}

/// Reads what is left of a request's content, if that is not too much: the next request comes after it.
fn skip_content(mut incoming: Feed) -> Option<Feed> {
    incoming.input.get_mut().allow(REQUEST_TIME);
    let mut skipped = 0;
    while skipped <= MOST_SKIPPED {
        let length = incoming.piece().ok()?.len();
        if length == 0 {
            return Some(incoming);
        }
        incoming.take(length);
        skipped += length as u64;
    }
    None
}

/// Says that nothing more comes, and reads what still does: closing a socket with unread input would send a reset, which can eat
/// the answer on its way (RFC 9112 section 9.6).
fn linger(mut socket: &TcpStream) {
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(LINGER_PAUSE));
    let deadline = Instant::now() + LINGER;
    while Instant::now() < deadline && socket.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {}
}

fn log_refusal(connection: &Connection, target: &str, refusal: &Refusal) {
    let (status, why) = response::explain(refusal);
    let (peer, code) = (&connection.peer, &status[..3]);
    let (target, why) = (Quoted(target.as_bytes()), Quoted(why.as_bytes()));
    log::line(format_args!(
        "refuse peer={peer} status={code} target={target} why={why}"
    ));
}

/// Adds one to a counter for as long as it lives, however its owner ends.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Counted<'a> {
        counter.fetch_add(1, Ordering::SeqCst);
        Counted(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
