//! Files that the host serves itself, without the app: out of a directory, or
//! out of the app's own layer.
//!
//! Those of a directory are opened relative to its own handle by cap-std, which
//! follows no link out of it, whoever may write there.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use cap_std::ambient_authority;
use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt as _};
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode};

use crate::compress::Accepted;
use crate::disk;
use crate::error::UserError;
use crate::failure::Failure;
use crate::file_part::{FilePart, FileToSend, Source as FileSource};
use crate::files::image::Image;
use crate::footprint::Footprint;

/// A file of up to this size is read when it is opened.
const SMALL: u64 = 64 << 10;
/// Files that are sent at a time out of one directory of the server's own.
const SERVED: usize = 1024;
/// `O_NONBLOCK`: to open a pipe must not wait for its writer.
const NONBLOCK: i32 = 0o4000;

/// A directory under a path.
pub struct Mount {
    /// Begins with a slash and ends without one.
    prefix: String,
    source: Source,
    /// What its files on their way to clients count for.
    footprint: Arc<Footprint>,
}

/// Where files come from.
#[derive(Clone)]
enum Source {
    Directory(Arc<Dir>),
    /// A directory of a layer, and what names the layer's content.
    Layer {
        image: Arc<Image>,
        directory: u32,
        digest: Arc<str>,
    },
}

impl Mount {
    /// Reads `/URL=DIR`.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if it is not of that form, or the directory can not be
    /// opened.
    pub fn parse(text: &str) -> Result<Mount, UserError> {
        let (prefix, directory) = split(text)?;
        Mount::directory(prefix, Path::new(directory)).map_err(|reason| refuse(text, &reason))
    }

    /// The files in the directory `path`, under `prefix`.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn directory(prefix: &str, path: &Path) -> Result<Mount, String> {
        let prefix = checked_prefix(prefix)?;
        let directory = Dir::open_ambient_dir(path, ambient_authority())
            .map_err(|error| format!("can not open the directory `{}`: {error}", path.display()))?;
        Ok(Mount::new(prefix, Source::Directory(Arc::new(directory))))
    }

    /// The files in the directory `path` of a layer, under `prefix`. `digest`
    /// tells the layer's content from that of all others.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn layer(prefix: &str, image: &Arc<Image>, path: &str, digest: &Arc<str>) -> Result<Mount, String> {
        let prefix = checked_prefix(prefix)?;
        let directory = image.look_up(Image::ROOT, path).ok().filter(|found| image.is_directory(*found));
        let directory = directory.ok_or_else(|| format!("the app has no directory `{path}`"))?;
        let source = Source::Layer { image: Arc::clone(image), directory, digest: Arc::clone(digest) };
        Ok(Mount::new(prefix, source))
    }

    fn new(prefix: &str, source: Source) -> Mount {
        Mount { prefix: prefix.into(), source, footprint: Footprint::with_files(SERVED) }
    }

    /// The mount as one of the tenant with this footprint, rather than the
    /// server's own.
    pub fn of(self, footprint: &Arc<Footprint>) -> Mount {
        Mount { footprint: Arc::clone(footprint), ..self }
    }

    /// The mount that a request's `path` lies under, and the rest of the path.
    /// Of several it is the innermost, in whatever order they were given.
    pub fn find<'a, 'b>(mounts: &'a [Mount], path: &'b str) -> Option<(&'a Mount, &'b str)> {
        let found = mounts.iter().filter_map(|mount| Some((mount, mount.below(path)?)));
        found.min_by_key(|(_, rest)| rest.len())
    }

    /// The rest of `path` if it lies under this mount.
    fn below<'a>(&self, path: &'a str) -> Option<&'a str> {
        path.strip_prefix(&*self.prefix)?.strip_prefix('/')
    }
}

/// Takes `/URL=DIR` apart.
///
/// # Errors
///
/// A [`UserError`] if it is not of that form.
pub fn split(text: &str) -> Result<(&str, &str), UserError> {
    let (prefix, directory) = text.split_once('=').ok_or_else(|| refuse(text, &"there is no `=`"))?;
    Ok((checked_prefix(prefix).map_err(|reason| refuse(text, &reason))?, directory))
}

/// `prefix` without a slash at its end.
fn checked_prefix(prefix: &str) -> Result<&str, String> {
    if !prefix.starts_with('/') || prefix.contains("//") {
        return Err(format!("the URL path `{prefix}` does not begin with one `/`"));
    }
    Ok(prefix.trim_end_matches('/'))
}

fn refuse(text: &str, reason: &dyn std::fmt::Display) -> UserError {
    UserError::new(format!("can not serve static files by `{text}`: {reason}"))
        .remedy("write the URL path and the directory, as in `--static /static=public`")
}

/// A file that was opened, and the representation of it that was chosen.
struct Opened {
    file: Arc<File>,
    /// Where its content begins.
    start: u64,
    size: u64,
    /// When it was changed. Unknown for files of a layer: what a build packs
    /// has no times, so that it does not differ by them.
    modified: Option<SystemTime>,
    /// What tells this content from another, but for the encoding.
    tag: String,
    /// `Content-Encoding`.
    encoding: Option<&'static str>,
}

/// Answers a request for the file `name` of a mount, as it is in the URL.
///
/// # Errors
///
/// The status to refuse it with.
pub async fn respond(mount: &Mount, name: &str, parts: &Parts) -> Result<Response<FileBody>, StatusCode> {
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let path = file_path(name).ok_or(StatusCode::NOT_FOUND)?;
    let accepted = Accepted::by(&parts.headers);
    let (source, footprint) = (mount.source.clone(), Arc::clone(&mount.footprint));
    let (headers, is_head) = (parts.headers.clone(), parts.method == Method::HEAD);
    // Opening a file may wait for a disk.
    let response = disk::begin(&mount.footprint, move || {
        let opened = source.open(&path, accepted)?;
        represent(opened, &path, &headers, is_head, &footprint)
    });
    match response.await {
        Some(Ok(response)) => Ok(response),
        Some(Err(error)) if error.kind() == io::ErrorKind::ResourceBusy => {
            Err(StatusCode::SERVICE_UNAVAILABLE)
        }
        Some(Err(error)) => {
            let is_absent = matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename
            );
            if !is_absent {
                tracing::warn!(path = parts.uri.path(), "can not serve a static file: {error}");
            }
            // Nor does a client learn what exists and is not for it.
            Err(StatusCode::NOT_FOUND)
        }
        None => Err(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

/// The file that the rest of a URL's path names: no hidden file, no way up,
/// and one name only for each file.
fn file_path(rest: &str) -> Option<PathBuf> {
    let decoded = decode(rest.as_bytes())?;
    let mut path = PathBuf::new();
    for name in decoded.split(|byte| *byte == b'/') {
        if name.is_empty() || name.starts_with(b".") || name.contains(&0) {
            return None;
        }
        path.push(OsStr::from_bytes(name));
    }
    Some(path)
}

/// Decodes `%XX`. A slash that is encoded is none of ours, so it is refused.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            decoded.push(*first);
            continue;
        }
        let [high, low, after @ ..] = tail else { return None };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let byte = u8::try_from(digit(*high)? << 4 | digit(*low)?).ok().filter(|byte| *byte != b'/')?;
        decoded.push(byte);
        rest = after;
    }
    Some(decoded)
}

impl Source {
    /// Opens the file, or a sibling with its compressed content.
    fn open(&self, path: &Path, accepted: Accepted) -> io::Result<Opened> {
        let plain = self.open_one(path)?;
        for (encoding, suffix) in accepted.in_order() {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            // One that is older than its source was made of another.
            if let Ok(found) = self.open_one(Path::new(&name))
                && found.modified >= plain.modified
            {
                return Ok(Opened { encoding: Some(encoding), ..found });
            }
        }
        Ok(plain)
    }

    fn open_one(&self, path: &Path) -> io::Result<Opened> {
        match self {
            Source::Directory(directory) => {
                let mut options = OpenOptions::new();
                options.read(true).custom_flags(NONBLOCK);
                let file = directory.open_with(path, &options)?.into_std();
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let (file, size) = (Arc::new(file), metadata.len());
                let modified = metadata.modified().unwrap_or(UNIX_EPOCH);
                let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
                let tag = format!("{size:x}-{:x}", since.as_nanos());
                Ok(Opened { file, start: 0, size, modified: Some(modified), tag, encoding: None })
            }
            Source::Layer { image, directory, digest } => {
                let absent = |_| io::Error::from(io::ErrorKind::NotFound);
                let path = path.to_str().ok_or(io::ErrorKind::NotFound)?;
                let node = image.look_up(*directory, path).map_err(absent)?;
                let (file, start, _) = image.place(node, 0, 0).map_err(absent)?;
                let tag = format!("{}-{start:x}", digest.get(..16).unwrap_or(digest));
                let size = image.stat(node).size;
                Ok(Opened { file: Arc::clone(file), start, size, modified: None, tag, encoding: None })
            }
        }
    }
}

/// Makes the response, after the conditions of the request in the order of
/// RFC 9110 section 13.2.2.
fn represent(
    opened: Opened,
    path: &Path,
    headers: &HeaderMap,
    is_head: bool,
    footprint: &Arc<Footprint>,
) -> io::Result<Response<FileBody>> {
    let tag = format!("\"{}{}\"", opened.tag, opened.encoding.unwrap_or_default());
    // Dates of HTTP have no fractions.
    let modified = opened.modified.map(|modified| {
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        UNIX_EPOCH + Duration::from_secs(since.as_secs())
    });

    let mut response = Response::new(FileBody::Whole(Bytes::new(), Arc::clone(footprint)));
    let fields = response.headers_mut();
    insert(fields, header::ETAG, &tag);
    if let Some(modified) = modified {
        insert(fields, header::LAST_MODIFIED, &httpdate::fmt_http_date(modified));
    }
    fields.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));

    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    // Several lines are one list.
    let tags = |name: HeaderName| {
        let lists: Vec<_> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
        (!lists.is_empty()).then(|| lists.join(","))
    };
    // Both dates, if the request has one and the file has one.
    let dates = |name| Some((httpdate::parse_http_date(text(name)?).ok()?, modified?));
    let failed = match tags(header::IF_MATCH) {
        Some(tags) => !names(&tags, &tag, true),
        None => dates(header::IF_UNMODIFIED_SINCE).is_some_and(|(asked, modified)| modified > asked),
    };
    if failed {
        *response.status_mut() = StatusCode::PRECONDITION_FAILED;
        return Ok(response);
    }
    let is_known = match tags(header::IF_NONE_MATCH) {
        Some(tags) => names(&tags, &tag, false),
        None => dates(header::IF_MODIFIED_SINCE).is_some_and(|(asked, modified)| modified <= asked),
    };
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }

    let is_fresh = text(header::IF_RANGE).is_none_or(|condition| {
        condition == tag || httpdate::parse_http_date(condition).is_ok_and(|date| Some(date) == modified)
    });
    let range = text(header::RANGE).filter(|_| is_fresh && !is_head);
    let (start, length) = match range.map_or(Wanted::Whole, |range| wanted(range, opened.size)) {
        Wanted::Whole => (0, opened.size),
        Wanted::Part(start, end) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let range = format!("bytes {start}-{end}/{}", opened.size);
            insert(response.headers_mut(), header::CONTENT_RANGE, &range);
            (start, end - start + 1)
        }
        Wanted::Nothing => {
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            let range = format!("bytes */{}", opened.size);
            insert(response.headers_mut(), header::CONTENT_RANGE, &range);
            return Ok(response);
        }
    };

    let fields = response.headers_mut();
    insert(fields, header::CONTENT_TYPE, &content_type(path));
    fields.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    fields.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if let Some(encoding) = opened.encoding {
        fields.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
    }
    if !is_head {
        *response.body_mut() = FileBody::of(opened, start, length, footprint)?;
    }
    Ok(response)
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // What we make has no character that a header can not have.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Whether a list of entity tags, or `*`, names `tag`. The strong comparison
/// takes no weak tag (RFC 9110 section 8.8.3.2).
fn names(list: &str, tag: &str, is_strong: bool) -> bool {
    list.split(',').map(str::trim).any(|listed| {
        let is_weak = listed.starts_with("W/");
        listed == "*" || (listed.trim_start_matches("W/") == tag && !(is_weak && is_strong))
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    /// First and last byte.
    Part(u64, u64),
    Nothing,
}

/// RFC 9110 section 14.2. Several ranges at once are not worth the parts they
/// are sent in: the whole file is a valid answer too.
fn wanted(range: &str, size: u64) -> Wanted {
    let Some((first, last)) = range.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-'))
    else {
        return Wanted::Whole;
    };
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (number(first), number(last)) {
        (None, Some(0)) if first.is_empty() => Wanted::Nothing,
        (None, Some(count)) if first.is_empty() && size > 0 => Wanted::Part(size - count.min(size), size - 1),
        (None, Some(_)) if first.is_empty() => Wanted::Nothing,
        (Some(first), Some(last)) if first > last => Wanted::Whole,
        (Some(first), _) if first >= size && (last.is_empty() || number(last).is_some()) => Wanted::Nothing,
        (Some(first), Some(last)) => Wanted::Part(first, last.min(size - 1)),
        (Some(first), None) if last.is_empty() => Wanted::Part(first, size - 1),
        _ => Wanted::Whole,
    }
}

fn content_type(path: &Path) -> String {
    let guessed = mime_guess::from_path(path).first_raw().unwrap_or("application/octet-stream");
    let is_text = guessed.starts_with("text/")
        || matches!(
            guessed,
            "application/javascript" | "application/json" | "application/xml" | "image/svg+xml"
        );
    if is_text { format!("{guessed}; charset=utf-8") } else { guessed.to_owned() }
}

/// The bytes of a file, or of a part of it.
pub enum FileBody {
    /// All of them, until they are taken, and what their tenant holds.
    Whole(Bytes, Arc<Footprint>),
    /// What is still to be read.
    Rest(FilePart),
}

impl FileBody {
    fn of(opened: Opened, first: u64, length: u64, footprint: &Arc<Footprint>) -> io::Result<FileBody> {
        if length <= SMALL {
            let held = footprint.try_hold(length).ok_or(io::ErrorKind::ResourceBusy)?;
            let mut whole = vec![0; usize::try_from(length).unwrap_or_default()];
            opened.file.read_exact_at(&mut whole, opened.start + first)?;
            return Ok(FileBody::Whole(held.tie(whole), Arc::clone(footprint)));
        }
        let place = footprint.file_place().ok_or(io::ErrorKind::ResourceBusy)?;
        let source = FileSource::Shared(opened.file);
        let file = FileToSend::new(source, (opened.start, opened.size), footprint, place);
        let part = FilePart::new(file, first, length);
        // The range was found to lie within the file.
        part.map(FileBody::Rest).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// What its tenant holds, or all those that are no tenant's.
    pub fn footprint(&self) -> &Arc<Footprint> {
        match self {
            FileBody::Whole(_, footprint) => footprint,
            FileBody::Rest(part) => part.footprint(),
        }
    }

    /// Bytes still to come.
    pub fn length(&self) -> u64 {
        match self {
            FileBody::Whole(bytes, _) => bytes.len() as u64,
            FileBody::Rest(part) => part.left(),
        }
    }

    /// The next piece.
    pub fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        match self {
            FileBody::Whole(bytes, _) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then_some(Ok(bytes)))
            }
            FileBody::Rest(part) => part.poll_next(context).map(|block| {
                // It has become shorter: the client must not take it for whole.
                Some(block?.map_err(|_| Failure::BadResponse("a static file ended early")))
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_only_down_and_to_nothing_hidden() {
        assert_eq!(file_path("css/a%20b.css").unwrap(), Path::new("css/a b.css"));
        for bad in [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/./b",
            ".env",
            "a/.git/config",
            "%2e%2e/x",
            "a//b",
            "a/",
            "a%2fb",
            "a%00",
            "a%",
            "a%4",
            "a%zz",
        ] {
            assert_eq!(file_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_innermost_mount_counts() {
        let root = tempfile::tempdir().unwrap();
        let mount = |prefix| Mount::directory(prefix, root.path()).unwrap();
        let mounts = [mount("/a"), mount("/a/b"), mount("/a/b/c/")];
        let found = |path| Mount::find(&mounts, path).map(|(mount, rest)| (&*mount.prefix, rest));
        assert_eq!(found("/a/b/x"), Some(("/a/b", "x")));
        assert_eq!(found("/a/b/c/x/y"), Some(("/a/b/c", "x/y")));
        assert_eq!(found("/a/bc"), Some(("/a", "bc")));
        assert_eq!(found("/b"), None);
    }

    #[test]
    fn ranges_follow_rfc_9110() {
        for (range, wanted_range) in [
            ("bytes=0-0", Wanted::Part(0, 0)),
            ("bytes=2-", Wanted::Part(2, 9)),
            ("bytes=-3", Wanted::Part(7, 9)),
            ("bytes=-99", Wanted::Part(0, 9)),
            ("bytes=5-99", Wanted::Part(5, 9)),
            ("bytes=5-99999999999999999999999", Wanted::Part(5, 9)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=10-12", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=3-2", Wanted::Whole),
            ("bytes=0-1,3-4", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("lines=0-1", Wanted::Whole),
        ] {
            assert_eq!(wanted(range, 10), wanted_range, "{range}");
        }
        assert_eq!(wanted("bytes=0-", 0), Wanted::Nothing);
        assert_eq!(wanted("bytes=-1", 0), Wanted::Nothing);
    }

    #[test]
    fn entity_tags_are_compared_as_their_kind_wants() {
        assert!(names("\"x\", W/\"y\"", "\"y\"", false));
        assert!(!names("\"x\", W/\"y\"", "\"y\"", true));
        assert!(names("*", "\"y\"", true));
    }

    mod fuzz {
        use super::super::*;
        use proptest::prelude::*;

        proptest! {
            #![proptest_config(crate::fuzz::config())]

            #[test]
            fn a_part_lies_within_its_file(
                range in "(bytes=)?[0-9]{0,3}-?[0-9]{0,21}|bytes=[ -~]{0,8}",
                size in 0u64..50,
            ) {
                if let Wanted::Part(first, last) = wanted(&range, size) {
                    prop_assert!(first <= last && last < size, "{first} to {last} of {size}");
                }
            }

            #[test]
            fn a_path_leads_down(path in "([a.%2eEfF0/\\\\]|%2e|%2f|\\.\\.|\\PC){0,8}") {
                if let Some(path) = file_path(&path) {
                    for part in path.components() {
                        let std::path::Component::Normal(name) = part else {
                            return Err(TestCaseError::fail(format!("{part:?}")));
                        };
                        prop_assert!(!name.as_bytes().starts_with(b".") && !name.as_bytes().contains(&0));
                    }
                    prop_assert!(!path.as_os_str().is_empty());
                }
            }
        }
    }
}
