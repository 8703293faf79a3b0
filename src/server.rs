//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::{Child, Feed, thread_builder};
use crate::listener::{Connection, Input, Listener};
use crate::log::{self, Quoted};
use crate::output::{Format, Stream};
use crate::request::{Answer, Head, Request, Result, form_value};
use crate::response::{self, CONTINUE, Manner, PAGE_METHODS, RUN_METHODS};
use crate::run::{self, TICK};
use crate::{config::Config, policy::Order, sys};
use std::io::{self, ErrorKind, prelude::*};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{fs::File, net::Shutdown, sync::Arc, thread};

/// In which a head must have arrived whole, and a form; however it trickles.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a connection waits for its next request.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Content that nobody asked for is read up to here, so that the connection can go on.
const MOST_SKIPPED: u64 = 1 << 20;
const LARGEST_FORM: u64 = 64 << 10;
/// How long a client that was told that the connection ends may pause in sending; fifteen times that it may go on.
const LINGER_PAUSE: Duration = Duration::from_secs(2);
/// `accept` fails at once as long as descriptors are out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Clients beyond the cap that are being told so.
const MOST_REFUSED: usize = 256;
/// What the server's end may take beyond `--grace`, and after a second signal.
const AFTER_GRACE: Duration = Duration::from_millis(900);
const AFTER_SECOND_SIGNAL: Duration = Duration::from_millis(400);

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
    server.accept_connections(listener);
    log::line(format_args!("shutdown"));
    server.wait_for_runs();
    Ok(())
}

impl Server {
    fn accept_connections(self: &Arc<Server>, listener: &Listener) {
        let spare = || self.null.try_clone().ok();
        // Given up when descriptors are out, so that a client more can be told so.
        let mut reserve = spare();
        while sys::signals() == 0 {
            if let Ok(connection) = listener.accept(TICK, self.config.limits.stall) {
                reserve = reserve.or_else(spare);
                self.start_conversation(Arc::new(connection));
            } else if reserve.take().is_none() {
                thread::sleep(ACCEPT_PAUSE);
                reserve = spare();
            }
        }
    }

    /// Serves a connection in a thread of its own, or says in one that there are too many.
    fn start_conversation(self: &Arc<Server>, connection: Arc<Connection>) {
        // Each connection's thread holds the server, as does this one.
        let others = Arc::strong_count(self) - 1;
        let (server, own) = (self.clone(), connection.clone());
        let converse = move || match others < server.config.max_connections {
            true => server.converse(own),
            false => server.turn_away(&own, LINGER_PAUSE),
        };
        let room = others < self.config.max_connections + MOST_REFUSED;
        if !room || thread_builder().spawn(converse).is_err() {
            self.turn_away(&connection, ACCEPT_PAUSE);
        }
    }

    fn turn_away(&self, connection: &Connection, pause: Duration) {
        let answer = Answer::Busy("no place for another connection");
        self.reply(connection, &Head::default(), &answer, true);
        linger(connection, pause);
    }

    /// The requests of a connection, one after the other.
    fn converse(&self, connection: Arc<Connection>) {
        let mut request = Request::new(Input::new(connection.clone()));
        loop {
            request.input.get_mut().allow(REQUEST_TIME);
            let Some(next) = self.exchange(&connection, request) else {
                return;
            };
            request = next;
            request.input.get_mut().allow(IDLE_TIME);
            if request.input.fill_buf().map_or(true, <[u8]>::is_empty) {
                return;
            }
        }
    }

    /// A request and its answer. Gives the input back where another request may follow.
    fn exchange(&self, connection: &Connection, request: Feed) -> Option<Feed> {
        let mut request = Some(request);
        let order = self.check(connection, request.as_mut()?);
        let close = request.as_ref()?.head.wants_close();
        let done = order.and_then(|order| self.run(connection, &order, &mut request));
        let close = match (done, &request) {
            (Ok(()), _) => close,
            (Err(Answer::Gone), _) | (_, None) => return None,
            (Err(answer), Some(request)) => {
                // Whether a client that was not told to go on sends its content all the same cannot be known.
                let close = close || request.awaits_continue || request.left > MOST_SKIPPED;
                let close = close || response::breaks_framing(&answer);
                self.reply(connection, &request.head, &answer, close);
                close
            }
        };
        let next = request
            .filter(|_| !close && sys::signals() == 0)
            .and_then(skip_content);
        if next.is_none() {
            linger(connection, LINGER_PAUSE);
        }
        next
    }

    /// Reads a request and checks it, in the order in which answers take precedence.
    fn check(&self, connection: &Connection, request: &mut Feed) -> Result<Order> {
        request.read_head()?;
        if request.begins_malformed(request.input.buffer()) {
            return Err(Answer::Malformed("malformed chunk"));
        }
        let (policy, head) = (&self.config.policy, &request.head);
        let (path, method) = (head.path.as_str(), head.method.as_str());
        policy.host(head, connection.local)?;
        if path != "/" || !matches!(method, "GET" | "HEAD") {
            policy.browser(head)?;
        }
        let methods = match path {
            "/" => PAGE_METHODS,
            "/run" | "*" => RUN_METHODS,
            _ => return Err(Answer::NoSuchPath),
        };
        match (path, method) {
            (_, "OPTIONS") => return Err(Answer::Options(methods)),
            ("/", "GET" | "HEAD") => return Err(Answer::Page),
            ("/run", "GET" | "HEAD" | "POST") => {}
            (_, "GET" | "HEAD" | "POST") => return Err(Answer::Method(methods)),
            _ => return Err(Answer::UnknownMethod),
        }
        policy.token(head)?;
        if !head.all("last-event-id").is_empty() {
            return Err(Answer::Repeated);
        }
        let (query, only_head) = (head.query.as_bytes(), method == "HEAD");
        let in_content = method == "POST" && form_value(query, b"command")?.is_none();
        let order = match in_content {
            true => policy.command(&self.read_form(connection, request)?)?,
            false => policy.command(query)?,
        };
        if only_head {
            Err(Answer::Head(format_for(&request.head)))
        } else {
            Ok(order)
        }
    }

    /// Content that is a form.
    fn read_form(&self, connection: &Connection, request: &mut Feed) -> Result<Vec<u8>> {
        let mut form = Vec::new();
        if request.left <= LARGEST_FORM && std::mem::take(&mut request.awaits_continue) {
            self.write(connection, CONTINUE);
        }
        request.input.get_mut().allow(REQUEST_TIME);
        while form.len() as u64 + request.left <= LARGEST_FORM {
            let piece = request.piece()?;
            form.extend_from_slice(piece);
            match piece.len() {
                0 => return Ok(form),
                length => request.take(length),
            }
        }
        Err(Answer::FormTooLarge)
    }

    /// Runs a command and streams it. A request's content, if there is any, is its standard input.
    fn run(
        &self,
        connection: &Connection,
        order: &Order,
        request: &mut Option<Feed>,
    ) -> Result<()> {
        // Counted before the signals are looked at: a server that ends sees the count, or this sees that it ends.
        self.runs.fetch_add(1, SeqCst);
        let done = match sys::signals() {
            0 => self.run_counted(connection, order, request),
            _ => Err(Answer::Busy("the server is shutting down")),
        };
        self.runs.fetch_sub(1, SeqCst);
        done
    }

    fn run_counted(
        &self,
        connection: &Connection,
        order: &Order,
        request: &mut Option<Feed>,
    ) -> Result<()> {
        let Some(Request {
            head,
            awaits_continue,
            ..
        }) = request
        else {
            return Err(Answer::Gone);
        };
        let format = format_for(head);
        let mut start = if *awaits_continue {
            CONTINUE.to_vec()
        } else {
            Vec::new()
        };
        start.extend(self.manner(head, head.wants_close()).stream(format));
        let fed = head.method == "POST";
        let mut feed = request.take_if(|request| fed && !request.is_at_end());
        let child = Child::start(&order.words, &self.null, &mut feed, format);
        *request = request.take().or(feed);
        let child = child?;
        let (peer, pid, command) = (&connection.peer, child.pid(), Quoted(&order.line));
        log::line(format_args!("run peer={peer} pid={pid} command={command}"));
        let stream = Stream::new(format, start);
        let (complete, feed) = run::run(child, connection, &self.config.limits, stream);
        *request = request.take().or(feed);
        if complete { Ok(()) } else { Err(Answer::Gone) }
    }

    /// Answers with anything but a command's output.
    fn reply(&self, connection: &Connection, head: &Head, answer: &Answer, close: bool) {
        let (status, why) = response::explain(answer);
        if !why.is_empty() {
            let (peer, code) = (&connection.peer, &status[..3]);
            let (target, why) = (Quoted(head.target.as_bytes()), Quoted(why.as_bytes()));
            log::line(format_args!(
                "refuse peer={peer} status={code} target={target} why={why}"
            ));
        }
        self.write(connection, &self.manner(head, close).render(answer));
    }

    fn manner<'a>(&self, head: &'a Head, close: bool) -> Manner<'a> {
        let foreign_origin = self.config.policy.foreign_origin(head);
        Manner {
            close,
            head_only: head.method == "HEAD",
            foreign_origin,
        }
    }

    /// Writes an answer whole, unless the client is gone or does not read, as the next read will tell.
    fn write(&self, connection: &Connection, mut bytes: &[u8]) {
        let deadline = Instant::now() + self.config.limits.stall;
        while !bytes.is_empty() && Instant::now() < deadline {
            match (&connection.socket).write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Waits for the commands to end, which they do by themselves once a signal has come.
    fn wait_for_runs(&self) {
        let mut deadline = Instant::now() + self.config.limits.grace + AFTER_GRACE;
        while self.runs.load(SeqCst) > 0 && Instant::now() < deadline {
            if sys::signals() > 1 {
                deadline = deadline.min(Instant::now() + AFTER_SECOND_SIGNAL);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Events, unless plain text is asked for and they are not (RFC 9110 section 12.5.1).
fn format_for(head: &Head) -> Format {
    let plain = head.lists("accept", "text/plain") && !head.lists("accept", "text/event-stream");
    Format {
        events: !plain,
        chunked: head.minor > 0,
    }
}

/// Reads what is left of a request's content, if that is not too much: the next request comes after it.
fn skip_content(mut request: Feed) -> Option<Feed> {
    request.input.get_mut().allow(REQUEST_TIME);
    let mut skipped = 0;
    while skipped <= MOST_SKIPPED {
        let length = request.piece().ok()?.len();
        if length == 0 {
            return Some(request);
        }
        request.take(length);
        skipped += length as u64;
    }
    None
}

/// Says that nothing more comes, and reads what still does, until the client pauses: closing a socket with unread input would send a
/// reset, which can eat the answer on its way (RFC 9112 section 9.6).
fn linger(connection: &Connection, pause: Duration) {
    let mut socket = &connection.socket;
    let _ = socket.shutdown(Shutdown::Write);
    let _ = socket.set_read_timeout(Some(pause));
    let deadline = Instant::now() + pause * 15;
    while Instant::now() < deadline && socket.read(&mut [0; 4096]).is_ok_and(|length| length > 0) {}
}
