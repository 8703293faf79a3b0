//! The accept loop, the connection cap, the shutdown, and the path of one connection.

use crate::child::Child;
use crate::listener::{Connection, Listener, is_passing};
use crate::log::{self, quoted};
use crate::request::{Answer, Content, Head, Result, ensure, form_value};
use crate::response::{self, CONTINUE, PAGE_METHODS, RUN_METHODS};
use crate::sys::{self, POLLIN, POLLOUT};
use crate::{config::Config, policy::Order, run};
use std::io::{self, prelude::*};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};
use std::{fs::File, hint::black_box, mem::take, net::Shutdown, process::Stdio, sync::Arc, thread};

/// Of every thread. Buffers are on the heap; a 32-bit host has no 2 MiB for each of hundreds.
const STACK: usize = 128 << 10;
/// In which a head must have arrived whole, and a form; however it trickles.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a connection waits for its next request.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// Content that nobody asked for is read up to here, so that the connection can go on.
const MOST_SKIPPED: u64 = 1 << 20;
const LARGEST_FORM: u64 = 64 << 10;
/// How long a client that was told that the connection ends may pause in sending; fifteen times that it may go on.
const LINGER_PAUSE: Duration = Duration::from_secs(2);
/// How long the server waits for a client before it looks for a signal that came just before it waited.
const ACCEPT_WAIT: Duration = Duration::from_millis(250);
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

/// Serves until a signal ends the server, and every command has ended.
pub fn serve(listener: Listener, config: Config) -> io::Result<()> {
    let shared = (Arc::new(listener), Arc::new(config), Arc::new(()));
    let (config, served) = (&shared.1, &shared.2);
    let spare = || UnixDatagram::unbound().ok();
    // Given up when descriptors are out, so that a client more can be told so.
    let mut reserve = spare();
    while sys::signals() == 0 {
        match shared.0.accept(ACCEPT_WAIT) {
            Ok(client) => {
                reserve = reserve.or_else(spare);
                start_thread(&shared, client);
            }
            Err(error) if is_passing(&error) => {}
            Err(_) if reserve.take().is_some() => {}
            Err(_) => {
                thread::sleep(ACCEPT_PAUSE);
                reserve = spare();
            }
        }
    }
    drop(shared.0);
    log::line(format_args!("shutdown"));
    // The served end by themselves once a signal has come, after their commands.
    let mut deadline = Instant::now() + config.limits.grace + AFTER_GRACE;
    while Arc::strong_count(served) > 1 && Instant::now() < deadline {
        if sys::signals() > 1 {
            deadline = deadline.min(Instant::now() + AFTER_SECOND_SIGNAL);
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Has a client in a thread of its own, or, where there are far too many, a word with it at once. The thread goes on with the client that
/// waits next: at 32 clients a sixth less of processor time for each run than a new thread for each. The last of what is shared is held
/// by every thread that serves, and not only tells that there is no place.
fn start_thread(shared: &(Arc<Listener>, Arc<Config>, Arc<()>), client: Connection) {
    let (listener, config, served) = shared;
    let is_served = Arc::strong_count(served) <= config.max_connections;
    let threads = Arc::weak_count(listener);
    let is_told = is_served || threads <= config.max_connections + MOST_REFUSED;
    let place = is_served.then(|| served.clone());
    let (listener, own) = (Arc::downgrade(listener), config.clone());
    let mut next = Some(client.clone());
    let converse = move || {
        while let Some(client) = next.take() {
            Conversation::new(own.clone(), client, place.is_some()).hold();
            let listener = listener.upgrade().filter(|_| place.is_some());
            next = listener.and_then(|it| it.accept(Duration::ZERO).ok());
        }
    };
    let mut reserve = black_box(Vec::<u8>::new());
    // It costs a twentieth of a short run, so the first few do without.
    let has_room = threads <= FEW || reserve.try_reserve(MEMORY_RESERVE).is_ok();
    let builder = thread::Builder::new().stack_size(STACK);
    if !is_told || !has_room || builder.spawn(converse).is_err() {
        // nginx takes an answer that precedes its request for the beginning of the next instance's, and says 502.
        sys::ready(&client.socket, POLLIN, ACCEPT_PAUSE);
        let mut refused = Conversation::new(config.clone(), client, false);
        refused.head.close = true;
        refused.reply(&BUSY);
        refused.linger(ACCEPT_PAUSE);
    }
}

/// A connection's requests and their answers, one after the other.
struct Conversation {
    config: Arc<Config>,
    /// Or only told that there is no place.
    is_served: bool,
    head: Head,
    content: Content<Connection>,
}

impl Conversation {
    fn new(config: Arc<Config>, client: Connection, is_served: bool) -> Conversation {
        Conversation {
            config,
            is_served,
            head: Head::default(),
            content: Content::new(client),
        }
    }

    fn hold(&mut self) {
        let mut is_open = true;
        while is_open {
            self.allow(REQUEST_TIME);
            is_open = self.exchange();
            self.allow(IDLE_TIME);
            is_open = is_open && self.content.input.fill_buf().is_ok_and(|it| !it.is_empty());
        }
    }

    /// Lets the client send for `time` from now, altogether.
    fn allow(&mut self, time: Duration) {
        self.content.input.get_mut().deadline = Instant::now() + time;
    }

    /// A request and its answer. Returns whether another request may follow.
    fn exchange(&mut self) -> bool {
        self.head = Head::default();
        let read = self.content.read_head(&mut self.head);
        self.head.origin = self.config.policy.foreign_origin(&self.head).ok().flatten();
        let mut order = read.and_then(|()| self.check());
        // Refusals come first.
        let is_granted = |answer: &Answer| response::explain(answer).0.starts_with('2');
        if !self.is_served && order.as_ref().map_or_else(is_granted, |_| true) {
            order = Err(BUSY);
        }
        if let Err(answer) = order.and_then(|order| self.run(&order)) {
            // Whether a client that was not told to go on sends its content all the same cannot be known.
            let is_unclear = self.content.awaits_continue || self.content.left > MOST_SKIPPED;
            self.head.close |= is_unclear || !self.is_served;
            self.head.close |= response::ends_connection(&answer);
            if answer == Answer::Gone || !self.reply(&answer) {
                return false;
            }
        }
        // The next request comes after what is left of this one's content.
        self.allow(REQUEST_TIME);
        let is_last = self.head.close || sys::signals() > 0;
        let goes_on = !is_last && self.content.read(MOST_SKIPPED, |_| ()).is_ok();
        if !goes_on {
            self.linger(LINGER_PAUSE);
        }
        goes_on
    }

    /// Checks a request, in the order in which answers take precedence.
    fn check(&mut self) -> Result<Order> {
        let (config, head) = (self.config.clone(), &self.head);
        let (policy, path, method) = (&config.policy, head.path.as_str(), head.method.as_str());
        policy.host(head, self.content.client().local())?;
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
        if method == "POST" && form_value(query, b"command")?.is_none() {
            if self.content.left <= LARGEST_FORM && take(&mut self.content.awaits_continue) {
                self.write(CONTINUE);
            }
            self.allow(REQUEST_TIME);
            let mut form = Vec::new();
            let read = |piece: &[u8]| form.extend_from_slice(piece);
            self.content.read(LARGEST_FORM, read)?;
            return policy.command(&form);
        }
        let order = policy.command(query)?;
        ensure(method != "HEAD", Answer::Head)?;
        Ok(order)
    }

    /// Runs a command and streams it. The content of a POST is its standard input.
    fn run(&mut self, order: &Order) -> Result {
        let head = &self.head;
        let mut stream = response::begin_stream(head);
        if take(&mut self.content.awaits_continue) {
            stream.batch.splice(..0, CONTINUE.iter().copied());
        }
        let is_fed = head.method == "POST" && !self.content.is_at_end();
        // An empty root has no such file; a pipe that nobody writes to reads the same.
        let null = File::open("/dev/null").ok().filter(|_| !is_fed);
        let stdin = null.map_or_else(Stdio::piped, Stdio::from);
        let child = Child::start(&order.words, stdin)?;
        let (pid, line) = (child.pid, quoted(&order.line));
        let peer = &self.content.client().peer;
        log::line(format_args!("run peer={peer} pid={pid} command={line}"));
        run::run(child, &mut self.content, &self.config.limits, stream)
    }

    /// Answers with anything but a command's output. Returns whether all of it was written.
    fn reply(&self, answer: &Answer) -> bool {
        let target = quoted(self.head.target.as_bytes());
        let peer = &self.content.client().peer;
        let (status, why) = response::explain(answer);
        let told = match answer {
            // A stream of its own, with this one event.
            Answer::NotStarted(code, _) if self.head.wants_events() => {
                let outcome = format!("out=failed code={code} ms=0 stdout_bytes=0 stderr_bytes=0");
                format!("exit peer={peer} pid=0 {outcome}")
            }
            _ => format!("refuse peer={peer} status={} target={target}", &status[..3]),
        };
        if !why.is_empty() {
            log::line(format_args!("{told} why={}", quoted(why.as_bytes())));
        }
        self.write(&response::render(&self.head, answer))
    }

    /// Writes an answer whole, unless the client is gone or does not read.
    fn write(&self, mut bytes: &[u8]) -> bool {
        let deadline = Instant::now() + self.config.limits.stall;
        let client = self.content.client();
        while !bytes.is_empty() {
            match (&*client.socket).write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if is_passing(&error) && client.wait(POLLOUT, deadline) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Says that nothing more comes, and reads what still does, until the client pauses: closing a socket with unread input would send
    /// a reset, which can eat the answer on its way (RFC 9112 section 9.6).
    fn linger(&mut self, pause: Duration) {
        let _ = self.content.client().socket.shutdown(Shutdown::Write);
        let end = Instant::now() + pause * 15;
        let mut goes_on = || {
            self.allow(pause);
            let read = self.content.input.get_mut().read(&mut [0; 4096]);
            read.is_ok_and(|length| length > 0)
        };
        while goes_on() && Instant::now() < end {}
    }
}
