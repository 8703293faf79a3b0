//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::{Child, Feed, exhausted, start_feeder, thread_builder};
use crate::listener::{Connection, Listener, is_passing};
use crate::log::{self, quoted};
use crate::request::{Answer, Content, Head, Result, ensure, form_value};
use crate::response::{self, CONTINUE, Manner, PAGE_METHODS, RUN_METHODS};
use crate::{config::Config, output::Stream, policy::Order, run, sys};
use std::hint::black_box;
use std::io::{self, prelude::*};
use std::time::{Duration, Instant};
use std::{fs::File, mem::take, net::Shutdown, sync::Arc, thread};

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
/// Memory that has to be there for one connection more: std ends the program where an allocation fails.
const MEMORY_RESERVE: usize = 8 << 20;
const FEW: usize = 16;
/// What the server's end may take beyond `--grace`, and after a second signal.
const AFTER_GRACE: Duration = Duration::from_millis(900);
const AFTER_SECOND_SIGNAL: Duration = Duration::from_millis(400);

const BUSY: Answer = Answer::Busy("no place for another connection");

/// Held by every connection's thread.
struct Server {
    config: Config,
    /// Standard input of commands without content.
    null: File,
    /// Held by every connection that is served, and not only told that there is no place.
    served: Arc<()>,
}

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: Listener, config: Config) -> io::Result<()> {
    // An empty root has no such file; a pipe that nobody writes to reads the same.
    let null = File::open("/dev/null").or_else(|_| sys::pipe().map(|(end, _)| end.into()))?;
    let served = Arc::default();
    let server = Arc::new(Server {
        config,
        null,
        served,
    });
    let limits = &server.config.limits;
    let spare = || server.null.try_clone().ok();
    // Given up when descriptors are out, so that a client more can be told so.
    let mut reserve = spare();
    while sys::signals() == 0 {
        match listener.accept(limits.heartbeat, limits.stall) {
            Ok(None) => {}
            Ok(Some(client)) => {
                reserve = reserve.or_else(spare);
                start_conversation(&server, Arc::new(client));
            }
            Err(_) if reserve.take().is_some() => {}
            Err(_) => {
                thread::sleep(ACCEPT_PAUSE);
                reserve = spare();
            }
        }
    }
    drop(listener);
    log::line(format_args!("shutdown"));
    // The served end by themselves once a signal has come, after their commands.
    let mut deadline = Instant::now() + limits.grace + AFTER_GRACE;
    while Arc::strong_count(&server.served) > 1 && Instant::now() < deadline {
        if sys::signals() > 1 {
            deadline = deadline.min(Instant::now() + AFTER_SECOND_SIGNAL);
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Has a connection in a thread of its own, or, where there are far too many, a word with it at once.
fn start_conversation(server: &Arc<Server>, client: Arc<Connection>) {
    let most = server.config.max_connections;
    let is_served = Arc::strong_count(&server.served) <= most;
    let place = is_served.then(|| server.served.clone());
    let (own, peer) = (server.clone(), client.clone());
    let converse = move || converse(&own, &peer, place.is_some());
    let threads = Arc::strong_count(server);
    let is_told = is_served || threads <= most + MOST_REFUSED;
    let mut reserve = black_box(Vec::<u8>::new());
    // It costs a twentieth of a short run, so the first few do without.
    let has_room = threads <= FEW || reserve.try_reserve(MEMORY_RESERVE).is_ok();
    if !is_told || !has_room || thread_builder().spawn(converse).is_err() {
        // nginx takes an answer that precedes its request for the beginning of the next instance's, and says 502.
        sys::ready(&client.socket, sys::POLLIN, ACCEPT_PAUSE);
        reply(server, &client, &Head::default(), &BUSY, true);
        linger(&client, ACCEPT_PAUSE);
    }
}

/// The requests of the connection, one after the other.
fn converse(server: &Server, client: &Connection, is_served: bool) {
    let mut content = Content::new(client);
    client.allow(REQUEST_TIME);
    while exchange(server, client, is_served, &mut content) {
        client.allow(IDLE_TIME);
        if content.input.fill_buf().map_or(true, <[u8]>::is_empty) {
            return;
        }
        client.allow(REQUEST_TIME);
    }
}

/// A request and its answer. Returns whether another request may follow.
fn exchange(server: &Server, client: &Connection, is_served: bool, content: &mut Feed) -> bool {
    let mut head = Head::default();
    let read = content.read_head(&mut head);
    let read = read.and_then(|()| ensure(is_served, BUSY));
    let order = read.and_then(|()| check(server, client, &head, content));
    let mut close = head.wants_close();
    match order.and_then(|order| run(server, client, &head, &order, content)) {
        Ok(()) => {}
        Err(Answer::Gone) => return false,
        Err(answer) => {
            // Whether a client that was not told to go on sends its content all the same cannot be known.
            let is_unclear = content.awaits_continue || content.left > MOST_SKIPPED;
            close |= is_unclear || response::ends_connection(&answer);
            if !reply(server, client, &head, &answer, close) {
                return false;
            }
            client.allow(REQUEST_TIME);
        }
    }
    // The next request comes after what is left of this one's content.
    close |= sys::signals() > 0 || content.read(MOST_SKIPPED, |_| ()).is_err();
    if close {
        linger(client, LINGER_PAUSE);
    }
    !close
}

/// Checks a request, in the order in which answers take precedence.
fn check(server: &Server, client: &Connection, head: &Head, content: &mut Feed) -> Result<Order> {
    let policy = &server.config.policy;
    let (path, method) = (head.path.as_str(), head.method.as_str());
    policy.host(head, client.local())?;
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
    ensure(head.all("last-event-id").is_empty(), Answer::Repeated)?;
    let query = head.query.as_bytes();
    let order = match method == "POST" && form_value(query, b"command")?.is_none() {
        true => policy.command(&read_form(server, client, content)?)?,
        false => policy.command(query)?,
    };
    ensure(method != "HEAD", Answer::Head)?;
    Ok(order)
}

/// Content that is a form.
fn read_form(server: &Server, client: &Connection, content: &mut Feed) -> Result<Vec<u8>> {
    if content.left <= LARGEST_FORM && take(&mut content.awaits_continue) {
        write(server, client, CONTINUE);
    }
    client.allow(REQUEST_TIME);
    let mut form = Vec::new();
    content.read(LARGEST_FORM, |piece| form.extend_from_slice(piece))?;
    Ok(form)
}

/// Runs a command and streams it. The content of a POST is its standard input.
fn run(
    server: &Server,
    client: &Connection,
    head: &Head,
    order: &Order,
    content: &mut Feed,
) -> Result<()> {
    let mut start = manner(server, head, head.wants_close()).stream();
    if take(&mut content.awaits_continue) {
        start.splice(..0, CONTINUE.iter().copied());
    }
    let stream = Stream::new(head.wants_events(), head.minor > 0, start);
    let is_fed = head.method == "POST" && !content.is_at_end();
    let null = || server.null.try_clone().map_err(exhausted);
    thread::scope(|scope| {
        let (feeder, stdin) = match is_fed {
            true => start_feeder(scope, content, client)?,
            false => (None, null()?.into()),
        };
        let child = Child::start(&order.words, stdin, feeder);
        // Without a command the feeder ends at once.
        let child = child.inspect_err(|_| client.allow(Duration::ZERO))?;
        let (peer, pid, line) = (&client.peer, child.pid, quoted(&order.line));
        log::line(format_args!("run peer={peer} pid={pid} command={line}"));
        let done = run::run(child, client, &server.config.limits, stream);
        // The next request comes after what the feeder still reads.
        client.allow(REQUEST_TIME * u32::from(!head.wants_close()));
        done
    })
}

/// Answers with anything but a command's output. Returns whether all of it was written.
fn reply(server: &Server, client: &Connection, head: &Head, answer: &Answer, close: bool) -> bool {
    let (status, why) = response::explain(answer);
    let (peer, code, target) = (&client.peer, &status[..3], quoted(head.target.as_bytes()));
    let told = match answer {
        // A stream of its own, with this one event.
        Answer::NotStarted(code, _) if head.wants_events() => {
            let outcome = format!("out=failed code={code} ms=0 stdout_bytes=0 stderr_bytes=0");
            format!("exit peer={peer} pid=0 {outcome}")
        }
        _ => format!("refuse peer={peer} status={code} target={target}"),
    };
    if !why.is_empty() {
        log::line(format_args!("{told} why={}", quoted(why.as_bytes())));
    }
    write(server, client, &manner(server, head, close).render(answer))
}

fn manner<'a>(server: &Server, head: &'a Head, close: bool) -> Manner<'a> {
    let origin = server.config.policy.foreign_origin(head);
    let origin = origin.unwrap_or(None);
    Manner {
        head,
        origin,
        close,
    }
}

/// Writes an answer whole, unless the client is gone or does not read.
fn write(server: &Server, client: &Connection, mut bytes: &[u8]) -> bool {
    let deadline = Instant::now() + server.config.limits.stall;
    while !bytes.is_empty() && Instant::now() < deadline {
        match (&client.socket).write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if is_passing(&error) => {}
            Err(_) => break,
        }
    }
    bytes.is_empty()
}

/// Says that nothing more comes, and reads what still does, until the client pauses: closing a socket with unread input would send
/// a reset, which can eat the answer on its way (RFC 9112 section 9.6).
fn linger(mut client: &Connection, pause: Duration) {
    let _ = client.socket.shutdown(Shutdown::Write);
    let deadline = Instant::now() + pause * 15;
    let mut goes_on = || {
        client.allow(pause);
        client.read(&mut [0; 4096]).is_ok_and(|length| length > 0)
    };
    while goes_on() && Instant::now() < deadline {}
}
