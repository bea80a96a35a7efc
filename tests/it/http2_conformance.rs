//! HTTP/2 on the wire, by section of RFC 9113: frames that a client may or may
//! not send, and what must come back. [`DEVIATIONS`] are the cases in which h2
//! does something else, each with what that is.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::Server;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITISED: u8 = 0x20;
/// A whole request without a body.
const WHOLE: u8 = END_STREAM | END_HEADERS;

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION_ERROR: u32 = 9;

/// What must come of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Due {
    /// A connection error of one of these kinds.
    Connection(&'static [u32]),
    /// A stream error of one of these kinds on the stream, or a connection error
    /// of that kind (section 5.4.1).
    Stream(&'static [u32]),
    /// The request is malformed: a stream error, or a response that
    /// refuses it (section 8.1.1).
    Malformed,
    /// The request is served.
    Served,
    /// Nothing comes of it, and the connection goes on.
    Nothing,
}

/// What has come of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Goaway(u32),
    Closed,
    Reset(u32),
    Served,
    Refused,
    Nothing,
}

impl Due {
    fn allows(&self, seen: Seen) -> bool {
        match (self, seen) {
            (Due::Connection(kinds), Seen::Goaway(kind))
            | (Due::Stream(kinds), Seen::Goaway(kind) | Seen::Reset(kind)) => kinds.contains(&kind),
            (Due::Malformed, Seen::Reset(kind) | Seen::Goaway(kind)) => kind == PROTOCOL_ERROR,
            (Due::Malformed, Seen::Refused) | (Due::Served, Seen::Served) | (Due::Nothing, Seen::Nothing) => {
                true
            }
            _ => false,
        }
    }
}

/// What is otherwise than RFC 9113 asks: section, name, what is seen, and why
/// that has to stay.
const DEVIATIONS: &[(&str, &str, Seen, &str)] = &[
    ("4.3", "a header block that is cut off", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("4.3", "the index 0", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("4.3", "an index that is not there", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("4.3", "a table larger than allowed", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    (
        "4.3",
        "a change of the table's size at the end of a block",
        Seen::Goaway(PROTOCOL_ERROR),
        LESS_SPECIFIC,
    ),
    ("4.3", "an integer without end", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("4.3", "Huffman code with padding of eight bits", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("4.3", "Huffman code with zeros for padding", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("4.3", "Huffman code with the end of string in it", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("5.1", "half closed: DATA", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("5.1", "half closed: HEADERS", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("5.1", "reset: HEADERS", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.3", "PRIORITY that is too short", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.4", "RST_STREAM that is too short", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.5", "an acknowledgement with settings", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.5", "SETTINGS that are cut off", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.5.2", "a window that is too large", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.7", "PING that is too short", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.8", "GOAWAY that is too short", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("6.9", "WINDOW_UPDATE that is too short", Seen::Goaway(PROTOCOL_ERROR), LESS_SPECIFIC),
    ("8.1", "pseudo-headers in trailers", Seen::Served, UNSEEN),
    ("8.3.1", "a path with a fragment", Seen::Served, CUT),
];

/// h2 has one code for all of these.
const LESS_SPECIFIC: &str = "the connection ends as it must, by h2's PROTOCOL_ERROR";
/// h2 takes them out of what it passes on, and trailers never reach an app.
const UNSEEN: &str = "h2 drops them, and we drop all trailers";
/// `http::uri::PathAndQuery`, in which h2 hands the path over, ends there.
const CUT: &str = "the crate http cuts the fragment off; nobody behind it sees that there was one";

/// A frame as it is.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// An integer of HPACK behind a prefix of seven bits that are zero.
fn length(mut value: usize) -> Vec<u8> {
    if value < 127 {
        return vec![value as u8];
    }
    let mut bytes = vec![127];
    value -= 127;
    while value >= 128 {
        bytes.push(value as u8 | 128);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A block of fields, as literals that are not indexed.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let field = |(name, value): &(&str, &str)| {
        let latin = |text: &str| text.chars().map(|char| char as u8).collect::<Vec<_>>();
        let (name, value) = (latin(name), latin(value));
        [vec![0], length(name.len()), name, length(value.len()), value].concat()
    };
    fields.iter().flat_map(field).collect()
}

const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":path", "/hello"), (":authority", "x.example")];
const POST: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "http"), (":path", "/echo"), (":authority", "x.example")];

/// The fields of a request, and some more.
fn with(request: &[(&str, &str)], more: &[(&str, &str)]) -> Vec<u8> {
    block(&[request, more].concat())
}

/// The fields of a request without one of them.
fn without(name: &str) -> Vec<u8> {
    block(&GET.into_iter().filter(|(other, _)| *other != name).collect::<Vec<_>>())
}

/// The fields of a request with another value for one of them.
fn but(name: &str, value: &str) -> Vec<u8> {
    block(&GET.map(|(other, old)| (other, if other == name { value } else { old })))
}

/// A request that is fine, on `stream`.
fn get(stream: u32) -> Vec<u8> {
    frame(HEADERS, WHOLE, stream, &block(&GET))
}

/// The head of a request whose body is still to come.
fn post(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &block(&POST))
}

/// One setting.
fn setting(id: u16, value: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

fn window(stream: u32, increment: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &8u32.to_be_bytes())
}

/// A PING of ours, by which we see what has been dealt with.
const MARK: &[u8; 8] = b"the mark";

/// A connection after its preface.
struct Client {
    stream: TcpStream,
}

impl Client {
    fn new(server: &Server, start: &[u8]) -> Client {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        // What follows a mistake may not be taken any more.
        let _ = stream.write_all(start);
        Client { stream }
    }

    /// The next frame: kind, flags, stream, payload. None at the end.
    fn read(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload))
    }

    /// What comes of what was sent, which ended with the mark. `about` is the
    /// stream that it is about, if not the connection.
    fn outcome(&mut self, about: Option<u32>) -> Seen {
        let wanted = about.unwrap_or(1);
        let (mut is_served, mut is_marked) = (None, false);
        loop {
            let Some((kind, flags, stream, payload)) = self.read() else { return Seen::Closed };
            match (kind, stream) {
                (GOAWAY, 0) => {
                    let reason = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                    if reason != 0 {
                        return Seen::Goaway(reason);
                    }
                }
                (RST_STREAM, _) if stream == wanted => {
                    return Seen::Reset(u32::from_be_bytes(payload.try_into().unwrap()));
                }
                // `:status: 200` comes first, as an entry of the static table.
                (HEADERS, _) if stream == wanted => is_served = Some(payload[0] == 0x88),
                (PING, 0) if flags == ACK && payload == MARK => is_marked = true,
                _ => {}
            }
            let has_ended = matches!(kind, DATA | HEADERS) && stream == wanted && flags & END_STREAM != 0;
            match is_served {
                Some(true) if has_ended => return Seen::Served,
                Some(false) if has_ended => return Seen::Refused,
                _ if is_marked && about.is_none() => return Seen::Nothing,
                _ => {}
            }
        }
    }
}

/// A section, what is sent, and what must come of it on a stream.
struct Case {
    section: &'static str,
    name: &'static str,
    sent: Vec<u8>,
    due: Due,
    stream: u32,
}

impl Case {
    /// About another stream than the first.
    fn on(self, stream: u32) -> Case {
        Case { stream, ..self }
    }
}

fn case(section: &'static str, name: &'static str, due: Due, frames: &[Vec<u8>]) -> Case {
    Case { section, name, sent: frames.concat(), due, stream: 1 }
}

/// HEADERS on stream 1 with these fields and END_STREAM.
fn request(section: &'static str, name: &'static str, due: Due, fields: Vec<u8>) -> Case {
    let mut sent = frame(HEADERS, WHOLE, 1, &[]);
    sent[..3].copy_from_slice(&u32::try_from(fields.len()).unwrap().to_be_bytes()[1..]);
    sent.extend(fields);
    Case { section, name, sent, due, stream: 1 }
}

fn cases() -> Vec<Case> {
    let (connection, stream) = (Due::Connection, Due::Stream);
    let pad = |length: u8, data: &[u8], padding: usize| [&[length], data, &vec![0; padding]].concat();
    let data = |payload: &[u8]| frame(DATA, END_STREAM, 1, payload);
    let get_block = block(&GET);
    let (first, second) = get_block.split_at(9);
    vec![
        case("4.1", "a frame of an unknown kind", Due::Served, &[frame(0x16, 0, 0, b"abc"), get(1)]),
        case("4.1", "flags that are not defined", Due::Served, &[frame(PING, 0x16, 0, b"12345678"), get(1)]),
        case(
            "4.1",
            "the reserved bit of a stream's number",
            Due::Served,
            &[frame(PING, 0, 1 << 31, b"12345678"), get(1)],
        ),
        case("4.2", "DATA of the largest size", Due::Served, &[post(1), data(&[b'x'; 16384])]),
        case("4.2", "DATA that is too large", stream(&[FRAME_SIZE_ERROR]), &[post(1), data(&[b'x'; 16385])]),
        case(
            "4.2",
            "HEADERS that are too large",
            connection(&[FRAME_SIZE_ERROR]),
            &[frame(HEADERS, WHOLE, 1, &with(&GET, &[("x", &"y".repeat(16384))]))],
        ),
        case(
            "4.3",
            "a header block that is cut off",
            connection(&[COMPRESSION_ERROR]),
            &[frame(HEADERS, WHOLE, 1, &get_block[..get_block.len() - 1])],
        ),
        request("4.3", "the index 0", connection(&[COMPRESSION_ERROR]), vec![0x80]),
        request("4.3", "an index that is not there", connection(&[COMPRESSION_ERROR]), vec![0xbf]),
        request("4.3", "a table larger than allowed", connection(&[COMPRESSION_ERROR]), {
            [&[0x3f, 0xff, 0xff, 0xff, 0x07], &get_block[..]].concat()
        }),
        request(
            "4.3",
            "a change of the table's size at the end of a block",
            connection(&[COMPRESSION_ERROR]),
            [&get_block[..], &[0x20]].concat(),
        ),
        request("4.3", "an integer without end", connection(&[COMPRESSION_ERROR]), {
            [&get_block[..], &[0xff; 20]].concat()
        }),
        request("4.3", "Huffman code with padding of eight bits", connection(&[COMPRESSION_ERROR]), {
            // `a` is 00011.
            [&get_block[..], b"\x00\x01x\x82\x1f\xff"].concat()
        }),
        request("4.3", "Huffman code with zeros for padding", connection(&[COMPRESSION_ERROR]), {
            [&get_block[..], b"\x00\x01x\x81\x18"].concat()
        }),
        request("4.3", "Huffman code with the end of string in it", connection(&[COMPRESSION_ERROR]), {
            [&get_block[..], b"\x00\x01x\x84\xff\xff\xff\xff"].concat()
        }),
        request("4.3", "Huffman code that is fine", Due::Served, {
            [&get_block[..], b"\x00\x01x\x81\x1f"].concat()
        }),
        case(
            "4.3",
            "another stream's HEADERS within a header block",
            connection(&[PROTOCOL_ERROR]),
            &[frame(HEADERS, END_STREAM, 1, first), get(3)],
        ),
        case(
            "4.3",
            "PRIORITY within a header block",
            connection(&[PROTOCOL_ERROR]),
            &[
                frame(HEADERS, END_STREAM, 1, first),
                frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]),
                frame(CONTINUATION, END_HEADERS, 1, second),
            ],
        ),
        case("5.1", "idle: DATA", connection(&[PROTOCOL_ERROR]), &[data(b"x")]),
        case("5.1", "idle: RST_STREAM", connection(&[PROTOCOL_ERROR]), &[reset(1)]),
        case("5.1", "idle: WINDOW_UPDATE", connection(&[PROTOCOL_ERROR]), &[window(1, 100)]),
        case(
            "5.1",
            "idle: CONTINUATION",
            connection(&[PROTOCOL_ERROR]),
            &[frame(CONTINUATION, END_HEADERS, 1, &get_block)],
        ),
        case("5.1", "idle: PRIORITY", Due::Served, &[frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]), get(1)]),
        case("5.1", "half closed: DATA", stream(&[STREAM_CLOSED]), &[get(1), data(b"x")]),
        case("5.1", "half closed: HEADERS", stream(&[STREAM_CLOSED]), &[get(1), get(1)]),
        case(
            "5.1",
            "half closed: CONTINUATION",
            connection(&[PROTOCOL_ERROR]),
            &[get(1), frame(CONTINUATION, END_HEADERS, 1, &get_block)],
        ),
        case(
            "5.1",
            "half closed: WINDOW_UPDATE and PRIORITY",
            Due::Served,
            &[get(1), window(1, 100), frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1])],
        ),
        case("5.1", "reset: DATA", stream(&[STREAM_CLOSED]), &[post(1), reset(1), data(b"x")]),
        case("5.1", "reset: HEADERS", stream(&[STREAM_CLOSED]), &[post(1), reset(1), get(1)]),
        case(
            "5.1",
            "reset: CONTINUATION",
            connection(&[PROTOCOL_ERROR, STREAM_CLOSED]),
            &[post(1), reset(1), frame(CONTINUATION, END_HEADERS, 1, &get_block)],
        ),
        case(
            "5.1",
            "reset: RST_STREAM, WINDOW_UPDATE and PRIORITY",
            Due::Nothing,
            &[post(1), reset(1), reset(1), window(1, 100), frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1])],
        ),
        case("5.1.1", "a stream with an even number", connection(&[PROTOCOL_ERROR]), &[get(2)]),
        case(
            "5.1.1",
            "a stream with a lower number",
            connection(&[PROTOCOL_ERROR, STREAM_CLOSED]),
            &[get(5), get(3)],
        ),
        case(
            "5.1.2",
            "as many streams as allowed",
            Due::Served,
            &[(0..7).flat_map(|index| post(index * 2 + 1)).collect(), get(15)],
        )
        .on(15),
        case(
            "5.1.2",
            "one stream more than allowed",
            stream(&[REFUSED_STREAM, PROTOCOL_ERROR]),
            &[(0..8).flat_map(|index| post(index * 2 + 1)).collect(), get(17)],
        )
        .on(17),
        case(
            "5.4.1",
            "a request before a mistake",
            connection(&[PROTOCOL_ERROR]),
            &[post(1), frame(DATA, 0, 0, b"x")],
        ),
        case(
            "5.5",
            "an unknown frame within a header block",
            connection(&[PROTOCOL_ERROR]),
            &[
                frame(HEADERS, END_STREAM, 1, first),
                frame(0x16, 0, 0, b"abc"),
                frame(CONTINUATION, END_HEADERS, 1, second),
            ],
        ),
        case("5.5", "an unknown setting", Due::Served, &[setting(0xff, 1), get(1)]),
        case("6.1", "DATA on stream 0", connection(&[PROTOCOL_ERROR]), &[frame(DATA, END_STREAM, 0, b"x")]),
        case(
            "6.1",
            "DATA with padding",
            Due::Served,
            &[post(1), frame(DATA, END_STREAM | PADDED, 1, &pad(5, b"hello", 5))],
        ),
        case(
            "6.1",
            "DATA of nothing but padding",
            Due::Served,
            &[post(1), frame(DATA, END_STREAM | PADDED, 1, &pad(5, b"", 5))],
        ),
        case(
            "6.1",
            "DATA with more padding than there is",
            connection(&[PROTOCOL_ERROR]),
            &[post(1), frame(DATA, END_STREAM | PADDED, 1, &pad(6, b"hello", 0))],
        ),
        case(
            "6.1",
            "DATA without the length of its padding",
            connection(&[PROTOCOL_ERROR, FRAME_SIZE_ERROR]),
            &[post(1), frame(DATA, END_STREAM | PADDED, 1, b"")],
        ),
        case(
            "6.2",
            "HEADERS on stream 0",
            connection(&[PROTOCOL_ERROR]),
            &[frame(HEADERS, WHOLE, 0, &get_block)],
        ),
        case(
            "6.2",
            "HEADERS with padding",
            Due::Served,
            &[frame(HEADERS, WHOLE | PADDED, 1, &pad(5, &get_block, 5))],
        ),
        case(
            "6.2",
            "HEADERS with more padding than there is",
            connection(&[PROTOCOL_ERROR]),
            &[frame(HEADERS, WHOLE | PADDED, 1, &pad(200, &get_block, 5))],
        ),
        case(
            "6.2",
            "HEADERS with a priority",
            Due::Served,
            &[frame(HEADERS, WHOLE | PRIORITISED, 1, &[&[0, 0, 0, 0, 15], &get_block[..]].concat())],
        ),
        case(
            "6.2",
            "HEADERS with a priority that is cut off",
            connection(&[FRAME_SIZE_ERROR, PROTOCOL_ERROR]),
            &[frame(HEADERS, WHOLE | PRIORITISED, 1, &[0, 0, 0])],
        ),
        case(
            "6.3",
            "PRIORITY on stream 0",
            connection(&[PROTOCOL_ERROR]),
            &[frame(PRIORITY, 0, 0, &[0, 0, 0, 0, 1])],
        ),
        case(
            "6.3",
            "PRIORITY that is too short",
            stream(&[FRAME_SIZE_ERROR]),
            &[post(1), frame(PRIORITY, 0, 1, &[0, 0, 0, 0])],
        ),
        case("6.4", "RST_STREAM on stream 0", connection(&[PROTOCOL_ERROR]), &[reset(0)]),
        case(
            "6.4",
            "RST_STREAM that is too short",
            connection(&[FRAME_SIZE_ERROR]),
            &[post(1), frame(RST_STREAM, 0, 1, &[0, 0, 8])],
        ),
        case("6.5", "SETTINGS on a stream", connection(&[PROTOCOL_ERROR]), &[frame(SETTINGS, 0, 1, &[])]),
        case(
            "6.5",
            "an acknowledgement with settings",
            connection(&[FRAME_SIZE_ERROR]),
            &[frame(SETTINGS, ACK, 0, &[0, 3, 0, 0, 0, 1])],
        ),
        case(
            "6.5",
            "SETTINGS that are cut off",
            connection(&[FRAME_SIZE_ERROR]),
            &[frame(SETTINGS, 0, 0, &[0, 3, 0])],
        ),
        case("6.5.2", "ENABLE_PUSH of 2", connection(&[PROTOCOL_ERROR]), &[setting(2, 2)]),
        case(
            "6.5.2",
            "a window that is too large",
            connection(&[FLOW_CONTROL_ERROR]),
            &[setting(4, 1 << 31)],
        ),
        case("6.5.2", "frames below the least size", connection(&[PROTOCOL_ERROR]), &[setting(5, 16383)]),
        case("6.5.2", "frames above the largest size", connection(&[PROTOCOL_ERROR]), &[setting(5, 1 << 24)]),
        case(
            "6.5.3",
            "two values, of which the last counts",
            Due::Served,
            &[frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0, 0, 4, 0, 0, 255, 255]), get(1)],
        ),
        case(
            "6.6",
            "PUSH_PROMISE",
            connection(&[PROTOCOL_ERROR]),
            &[post(1), frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], &get_block[..]].concat())],
        ),
        case("6.7", "PING on a stream", connection(&[PROTOCOL_ERROR]), &[frame(PING, 0, 1, b"12345678")]),
        case(
            "6.7",
            "PING that is too short",
            connection(&[FRAME_SIZE_ERROR]),
            &[frame(PING, 0, 0, b"1234567")],
        ),
        case("6.7", "an answer to no PING", Due::Nothing, &[frame(PING, ACK, 0, b"12345678")]),
        case("6.8", "GOAWAY on a stream", connection(&[PROTOCOL_ERROR]), &[frame(GOAWAY, 0, 1, &[0; 8])]),
        case(
            "6.8",
            "GOAWAY that is too short",
            connection(&[FRAME_SIZE_ERROR]),
            &[frame(GOAWAY, 0, 0, &[0; 7])],
        ),
        case(
            "6.9",
            "a window for the connection, larger by 0",
            connection(&[PROTOCOL_ERROR]),
            &[window(0, 0)],
        ),
        case(
            "6.9",
            "a window for a stream, larger by 0",
            stream(&[PROTOCOL_ERROR]),
            &[post(1), window(1, 0)],
        ),
        case(
            "6.9",
            "WINDOW_UPDATE that is too short",
            connection(&[FRAME_SIZE_ERROR]),
            &[frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1])],
        ),
        case(
            "6.9.1",
            "a window for the connection beyond its bounds",
            connection(&[FLOW_CONTROL_ERROR]),
            &[window(0, (1 << 31) - 1)],
        ),
        case(
            "6.9.1",
            "a window for a stream beyond its bounds",
            stream(&[FLOW_CONTROL_ERROR]),
            &[post(1), window(1, (1 << 31) - 1)],
        ),
        case(
            "6.9.2",
            "windows that grow beyond their bounds by a setting",
            connection(&[FLOW_CONTROL_ERROR]),
            &[post(1), window(1, 65536), setting(4, (1 << 31) - 1)],
        ),
        case("6.10", "a header block in many pieces", Due::Served, &{
            let mut frames = vec![frame(HEADERS, END_STREAM, 1, first)];
            frames.extend(second.chunks(20).map(|piece| frame(CONTINUATION, 0, 1, piece)));
            frames.push(frame(CONTINUATION, END_HEADERS, 1, b""));
            frames
        }),
        case(
            "6.10",
            "DATA within a header block",
            connection(&[PROTOCOL_ERROR]),
            &[frame(HEADERS, END_STREAM, 1, first), data(b"x")],
        ),
        case(
            "6.10",
            "CONTINUATION on stream 0",
            connection(&[PROTOCOL_ERROR]),
            &[frame(HEADERS, END_STREAM, 1, first), frame(CONTINUATION, END_HEADERS, 0, second)],
        ),
        case(
            "6.10",
            "CONTINUATION of another stream",
            connection(&[PROTOCOL_ERROR]),
            &[frame(HEADERS, END_STREAM, 1, first), frame(CONTINUATION, END_HEADERS, 3, second)],
        ),
        case(
            "6.10",
            "CONTINUATION behind the end of a header block",
            connection(&[PROTOCOL_ERROR]),
            &[post(1), frame(CONTINUATION, END_HEADERS, 1, &get_block)],
        ),
        case(
            "6.10",
            "CONTINUATION behind DATA",
            connection(&[PROTOCOL_ERROR]),
            &[post(1), frame(DATA, 0, 1, b"x"), frame(CONTINUATION, END_HEADERS, 1, &get_block)],
        ),
        case(
            "8.1",
            "trailers",
            Due::Served,
            &[post(1), frame(DATA, 0, 1, b"x"), frame(HEADERS, WHOLE, 1, &block(&[("x-trailer", "y")]))],
        ),
        case(
            "8.1",
            "trailers that do not end the stream",
            Due::Malformed,
            &[
                post(1),
                frame(DATA, 0, 1, b"x"),
                frame(HEADERS, END_HEADERS, 1, &block(&[("x-trailer", "y")])),
                data(b"y"),
            ],
        ),
        case(
            "8.1",
            "pseudo-headers in trailers",
            Due::Malformed,
            &[post(1), frame(DATA, 0, 1, b"x"), frame(HEADERS, WHOLE, 1, &block(&[(":method", "POST")]))],
        ),
        case(
            "8.1.1",
            "fewer bytes than Content-Length",
            Due::Malformed,
            &[frame(HEADERS, END_HEADERS, 1, &with(&POST, &[("content-length", "5")])), data(b"four")],
        ),
        case(
            "8.1.1",
            "more bytes than Content-Length",
            Due::Malformed,
            &[frame(HEADERS, END_HEADERS, 1, &with(&POST, &[("content-length", "3")])), data(b"four")],
        ),
        case(
            "8.1.1",
            "more bytes than Content-Length, in pieces",
            Due::Malformed,
            &[
                frame(HEADERS, END_HEADERS, 1, &with(&POST, &[("content-length", "5")])),
                frame(DATA, 0, 1, b"abc"),
                data(b"abc"),
            ],
        ),
        request("8.1.1", "a Content-Length without a body", Due::Malformed, {
            with(&POST, &[("content-length", "5")])
        }),
        case(
            "8.1.1",
            "as many bytes as Content-Length",
            Due::Served,
            &[
                frame(HEADERS, END_HEADERS, 1, &with(&POST, &[("content-length", "6")])),
                frame(DATA, 0, 1, b"abc"),
                data(b"def"),
            ],
        ),
        request("8.1.1", "two lengths that differ", Due::Malformed, {
            with(&POST, &[("content-length", "0"), ("content-length", "1")])
        }),
        request("8.1.1", "two lengths that are equal", Due::Malformed, {
            with(&POST, &[("content-length", "0"), ("content-length", "0")])
        }),
        request(
            "8.1.1",
            "a length that is no number",
            Due::Malformed,
            with(&POST, &[("content-length", "+0")]),
        ),
        request("8.2", "capitals in a name", Due::Malformed, with(&GET, &[("X-Test", "x")])),
        request("8.2.1", "a space in a name", Due::Malformed, with(&GET, &[("x y", "x")])),
        request("8.2.1", "a colon in a name", Due::Malformed, with(&GET, &[("x:y", "x")])),
        request("8.2.1", "a line end in a name", Due::Malformed, with(&GET, &[("x\r\ny", "x")])),
        request("8.2.1", "an empty name", Due::Malformed, with(&GET, &[("", "x")])),
        request("8.2.1", "a byte above ASCII in a name", Due::Malformed, with(&GET, &[("x\u{e9}", "x")])),
        request("8.2.1", "a NUL in a value", Due::Malformed, with(&GET, &[("x", "a\0b")])),
        request("8.2.1", "a CR in a value", Due::Malformed, with(&GET, &[("x", "a\rb")])),
        request("8.2.1", "an LF in a value", Due::Malformed, with(&GET, &[("x", "a\nb")])),
        request("8.2.1", "a space before a value", Due::Malformed, with(&GET, &[("x", " a")])),
        request("8.2.1", "a tab behind a value", Due::Malformed, with(&GET, &[("x", "a\t")])),
        request("8.2.1", "a byte above ASCII in a value", Due::Served, with(&GET, &[("x", "\u{e9}")])),
        request("8.2.2", "Connection", Due::Malformed, with(&GET, &[("connection", "keep-alive")])),
        request("8.2.2", "Keep-Alive", Due::Malformed, with(&GET, &[("keep-alive", "timeout=5")])),
        request("8.2.2", "Proxy-Connection", Due::Malformed, with(&GET, &[("proxy-connection", "close")])),
        request(
            "8.2.2",
            "Transfer-Encoding",
            Due::Malformed,
            with(&GET, &[("transfer-encoding", "chunked")]),
        ),
        request("8.2.2", "Upgrade", Due::Malformed, with(&GET, &[("upgrade", "websocket")])),
        request("8.2.2", "TE of another value", Due::Malformed, with(&GET, &[("te", "trailers, deflate")])),
        request("8.2.2", "TE: trailers", Due::Served, with(&GET, &[("te", "trailers")])),
        request("8.3", "an unknown pseudo-header", Due::Malformed, with(&GET, &[(":test", "x")])),
        request("8.3", "one of responses", Due::Malformed, with(&GET, &[(":status", "200")])),
        request("8.3", "a pseudo-header behind a field", Due::Malformed, {
            block(&[GET[0], GET[1], GET[3], ("x", "y"), GET[2]])
        }),
        request("8.3", "a method twice", Due::Malformed, with(&GET, &[(":method", "GET")])),
        request("8.3", "a scheme twice", Due::Malformed, with(&GET, &[(":scheme", "http")])),
        request("8.3", "a path twice", Due::Malformed, with(&GET, &[(":path", "/hello")])),
        request("8.3", "an authority twice", Due::Malformed, with(&GET, &[(":authority", "x.example")])),
        request("8.3.1", "no method", Due::Malformed, without(":method")),
        request("8.3.1", "no scheme", Due::Malformed, without(":scheme")),
        request("8.3.1", "no path", Due::Malformed, without(":path")),
        request("8.3.1", "an empty path", Due::Malformed, but(":path", "")),
        request("8.3.1", "a path without a slash", Due::Malformed, but(":path", "hello")),
        request("8.3.1", "a path that is a URL", Due::Malformed, but(":path", "http://x.example/hello")),
        request("8.3.1", "an asterisk for a path", Due::Malformed, but(":path", "*")),
        request("8.3.1", "a path with a space", Due::Malformed, but(":path", "/hello x")),
        request("8.3.1", "a path with a fragment", Due::Malformed, but(":path", "/hello#x")),
        request("8.3.1", "a path with a byte above ASCII", Due::Malformed, but(":path", "/hello\u{e9}")),
        request("8.3.1", "a method with a space", Due::Malformed, but(":method", "GET /x")),
        request("8.3.1", "an empty method", Due::Malformed, but(":method", "")),
        request("8.3.1", "a scheme of its own", Due::Malformed, but(":scheme", "ftp")),
        request("8.3.1", "a user in the authority", Due::Malformed, but(":authority", "me@x.example")),
        request("8.3.1", "an authority with a path", Due::Malformed, but(":authority", "x.example/y")),
        request("8.3.1", "an empty authority", Due::Malformed, but(":authority", "")),
        request("8.3.1", "neither authority nor Host", Due::Malformed, without(":authority")),
        request("8.3.1", "Host in place of the authority", Due::Served, {
            block(&[GET[0], GET[1], GET[2], ("host", "x.example")])
        }),
        request(
            "8.3.1",
            "Host that is not the authority",
            Due::Malformed,
            with(&GET, &[("host", "y.example")]),
        ),
        request("8.3.1", "Host that is the authority", Due::Served, with(&GET, &[("host", "x.example")])),
        request("8.5", "CONNECT", Due::Malformed, block(&[(":method", "CONNECT"), (":authority", "x:443")])),
        request("8.5", "CONNECT with a path", Due::Malformed, but(":method", "CONNECT")),
        request("8.5", "CONNECT with a protocol (RFC 8441)", Due::Malformed, {
            block(&[(":method", "CONNECT"), GET[1], GET[2], GET[3], (":protocol", "websocket")])
        }),
    ]
}

#[test]
fn http2_is_what_its_rfc_says() {
    let server = Server::start("behaviours", &["--http2-streams", "8"]);
    let cases = cases();
    let (mut wrong, mut deviating) = (Vec::new(), Vec::new());
    let mut sections = BTreeMap::<_, usize>::new();
    for Case { section, name, sent, due, stream } in &cases {
        *sections.entry(*section).or_default() += 1;
        let settings = frame(SETTINGS, 0, 0, &[]);
        let mark = frame(PING, 0, 0, MARK);
        let mut client = Client::new(&server, &[PREFACE, &settings, sent, &mark].concat());
        let is_about_stream = !matches!(due, Due::Connection(_) | Due::Nothing);
        let seen = client.outcome(is_about_stream.then_some(*stream));
        let known = DEVIATIONS.iter().find(|known| (known.0, known.1) == (*section, *name));
        match known {
            None if due.allows(seen) => {}
            Some((_, _, expected, reason)) if *expected == seen => {
                deviating.push(format!("{section} {name}: {seen:?}: {reason}"));
            }
            _ => wrong.push(format!("{section} {name}: {seen:?}, but {due:?} is due")),
        }
        if matches!(seen, Seen::Goaway(_)) {
            // Section 5.4.1: then the connection ends.
            while client.read().is_some() {}
        }
    }
    eprintln!(
        "HTTP/2: {} cases of {} sections of RFC 9113: {} as it says, {} otherwise:\n{}",
        cases.len(),
        sections.len(),
        cases.len() - deviating.len() - wrong.len(),
        deviating.len(),
        deviating.join("\n"),
    );
    let unknown = DEVIATIONS
        .iter()
        .find(|known| !cases.iter().any(|case| (case.section, case.name) == (known.0, known.1)));
    assert!(unknown.is_none(), "no such case: {unknown:?}");
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    server.finish();
}
