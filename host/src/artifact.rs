//! The file that `build` makes and `serve` runs: one standard component, with
//! everything else the app needs in custom sections behind it.
//!
//! | custom section             | content                                       | guest path |
//! |----------------------------|-----------------------------------------------|------------|
//! | `wsgi-wasm:manifest`       | [`Manifest`] as JSON                          |            |
//! | `wsgi-wasm:layer:python`   | standard library, tar compressed by zstd      | `/python`  |
//! | `wsgi-wasm:layer:app`      | the app's own files, likewise                 | `/0`       |
//! | `wsgi-wasm:layer:site`     | vendored packages and the adapter, likewise   | `/1`       |
//!
//! The guest paths are those at which componentize-py mounts the directories
//! while it makes the snapshot; paths in the snapshot (`__file__`,
//! `sys.path`) stay right only if they are the same at run time.
//!
//! Nothing here is trusted. Any component that exports our world can be
//! served, whoever made it; a layer is unpacked by its true digest, and may
//! hold only plain files below its top. If there is a manifest, what it lists
//! must be there, byte for byte: a file that was cut off between two sections,
//! or damaged, is not run.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cache::{self, Bucket, Cache, Identity, Key, Links, walk};
use crate::error::UserError;
use crate::files::image::Image;
use crate::guest_log::Printable;
use anyhow::{Context as _, Result, bail};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

const MANIFEST_SECTION: &str = "wsgi-wasm:manifest";
const LAYER_SECTION: &str = "wsgi-wasm:layer:";

/// The newest manifest format that this host reads.
pub const MANIFEST_FORMAT: u32 = 1;

/// What an untrusted layer may unpack to.
const LAYER_MAX_BYTES: u64 = 2 << 30;

/// What is in an artifact and how it was made. Serves people and tools; the
/// host decides nothing by it that matters for safety.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`] when it was written.
    pub format: u32,
    /// The WSGI callable, as `module:attribute`.
    pub application: String,
    /// Version of the guest's interpreter.
    pub python: String,
    /// The tools that made the artifact, with their versions.
    pub tools: BTreeMap<String, String>,
    /// The vendored packages: the software bill of materials.
    pub packages: Vec<Package>,
    /// Paths that were requested before the snapshot.
    pub warmup: Vec<String>,
    /// Variables set for the build, and at run time unless overridden.
    pub environment: BTreeMap<String, String>,
    /// Directories of the app whose files the host serves itself, by the path
    /// of the URL.
    #[serde(default, rename = "static", skip_serializing_if = "BTreeMap::is_empty")]
    pub static_files: BTreeMap<String, String>,
    /// Digest of everything that went into the build.
    pub inputs: String,
    /// Digest of the component without our sections; older files have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<String>,
    /// The layers in the file.
    pub layers: Vec<LayerSummary>,
}

/// One vendored package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Name in its normalised form: lower case, words joined by `-`.
    pub name: String,
    /// Resolved version.
    pub version: String,
    /// Licence from the package's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// Digest of the distribution file that was installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The packages that asked for it; empty if the project itself did.
    #[serde(default)]
    pub required_by: Vec<String>,
}

/// One layer as the manifest lists it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerSummary {
    /// Which one it is.
    pub name: Layer,
    /// Digest of the compressed layer.
    pub sha256: String,
    /// Number of files.
    pub files: u64,
    /// Their size unpacked, in bytes.
    pub size: u64,
}

/// A set of files with a fixed place in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// The standard library.
    Python,
    /// The app's own files.
    App,
    /// Vendored packages and the adapter.
    Site,
}

impl Layer {
    /// All layers, in the order in which they are written.
    pub const ALL: [Layer; 3] = [Layer::Python, Layer::Site, Layer::App];

    /// The layer's name in a section and a manifest.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Python => "python",
            Layer::App => "app",
            Layer::Site => "site",
        }
    }

    /// Where the guest sees the layer.
    pub fn guest_path(self) -> &'static str {
        match self {
            Layer::Python => "/python",
            Layer::App => "/0",
            Layer::Site => "/1",
        }
    }
}

/// A layer packed for an artifact.
#[derive(Clone, Debug)]
pub struct PackedLayer {
    /// Which one it is.
    pub layer: Layer,
    /// A tar archive compressed by zstd.
    pub bytes: Vec<u8>,
    /// Number of files in it.
    pub files: u64,
    /// Their size unpacked, in bytes.
    pub size: u64,
}

impl PackedLayer {
    /// Packs all plain files below `root`. The same files give the same bytes:
    /// names are sorted, and times and owners are left out.
    ///
    /// # Errors
    ///
    /// If a file can not be read or its name can not stand in a tar archive.
    pub fn pack(layer: Layer, root: &Path) -> Result<PackedLayer> {
        let mut archive = tar::Builder::new(zstd::Encoder::new(Vec::new(), 6)?);
        let (mut files, mut size) = (0, 0);
        for relative in walk(root, Links::Skip, &mut |_, _| true)? {
            let path = root.join(&relative);
            let mut append = || -> io::Result<u64> {
                let mut file = File::open(&path)?;
                let length = file.metadata()?.len();
                let mut header = tar::Header::new_gnu();
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(0o644);
                header.set_mtime(0);
                header.set_size(length);
                archive.append_data(&mut header, &relative, &mut file)?;
                Ok(length)
            };
            size += append().with_context(|| format!("failed to pack `{}`", path.display()))?;
            files += 1;
        }
        let bytes = archive.into_inner()?.finish()?;
        Ok(PackedLayer { layer, bytes, files, size })
    }

    /// The layer's line in the manifest.
    pub fn summary(&self) -> LayerSummary {
        LayerSummary {
            name: self.layer,
            sha256: cache::sha256(&self.bytes),
            files: self.files,
            size: self.size,
        }
    }
}

/// Puts the manifest and the layers behind `component`.
pub fn assemble(component: Vec<u8>, manifest: &Manifest, layers: &[PackedLayer]) -> Result<Vec<u8>> {
    let mut artifact = component;
    append_custom_section(&mut artifact, MANIFEST_SECTION, &serde_json::to_vec(manifest)?);
    for layer in layers {
        append_custom_section(&mut artifact, &format!("{LAYER_SECTION}{}", layer.layer.name()), &layer.bytes);
    }
    Ok(artifact)
}

/// Appends a custom section (core specification 5.5.3): the name with its
/// length, then the content.
fn append_custom_section(component: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut length = Vec::new();
    write_leb128(name.len(), &mut length);
    append_section(component, 0, &[&length, name.as_bytes(), content]);
}

/// Appends a section (core specification 5.5.2): its id, its size, and its
/// content in `parts`.
pub fn append_section(component: &mut Vec<u8>, id: u8, parts: &[&[u8]]) {
    component.push(id);
    write_leb128(parts.iter().map(|part| part.len()).sum(), component);
    for part in parts {
        component.extend_from_slice(part);
    }
}

/// One section of a component.
#[derive(Clone, Debug)]
pub struct Section {
    /// What kind it is; 0 is a custom section, 1 a core module.
    pub id: u8,
    /// Where it starts, with its id and size.
    pub start: usize,
    /// Its content.
    pub content: Range<usize>,
}

/// The sections of a component, in order. Ends with `None` where the component
/// is cut off.
pub fn sections(component: &[u8]) -> impl Iterator<Item = Option<Section>> + '_ {
    let mut start = PREAMBLE;
    std::iter::from_fn(move || {
        let head = component.get(start..).filter(|head| !head.is_empty())?;
        let section = Section::parse(head, start, component.len());
        start = section.as_ref().map_or(component.len(), |section| section.content.end);
        Some(section)
    })
}

impl Section {
    /// The section of which `head` is the beginning, at `start` in a component
    /// of `size` bytes; none if it does not end there.
    fn parse(head: &[u8], start: usize, size: usize) -> Option<Section> {
        let (id, mut at) = (*head.first()?, 1);
        let length = read_leb128(head, &mut at)?;
        let end = start.checked_add(at)?.checked_add(length).filter(|end| *end <= size)?;
        Some(Section { id, start, content: start + at..end })
    }
}

/// Bytes before the first section: magic, version, layer.
const PREAMBLE: usize = 8;
/// Bytes of an artifact's own text in a message at most.
const MAX_QUOTED: usize = 500;
/// Bytes of a section's id and size at most.
const SECTION_HEAD: usize = 6;
/// Bytes to read of a custom section to know whether it is one of ours.
const NAME: usize = 64;

/// An artifact, taken apart. Its parts are read when they are asked for: a
/// host that knows it already needs few of them.
pub struct Artifact {
    /// Where it came from, for messages.
    pub path: PathBuf,
    file: File,
    size: usize,
    /// The parts that are the component itself.
    component: Vec<Range<usize>>,
    manifest: Option<Manifest>,
    layers: Vec<(Layer, Range<usize>)>,
}

/// Digests of an artifact's parts, in hexadecimal. They are what machine code
/// and files in the cache are found by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// SHA-256 of the component without our sections.
    pub component: String,
    /// SHA-256 of each packed layer, in the order of the file.
    layers: Vec<String>,
}

impl Artifact {
    /// Opens the file at `path` and finds its parts.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if there is no such file, or it is not a whole component.
    pub fn open(path: &Path) -> Result<Artifact> {
        let open = || -> io::Result<(File, u64)> {
            // Not to wait for the other end of a pipe.
            let nonblock = i32::from_ne_bytes(OFlags::NONBLOCK.bits().to_ne_bytes());
            let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path)?;
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                return Err(io::Error::other("it is a directory"));
            }
            if !metadata.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            Ok((file, metadata.len()))
        };
        let (file, size) = open().map_err(|error| unreadable(path, &error))?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let refuse = |reason: &str| {
            UserError::new(format!("`{}` {reason}", path.display()))
                .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
        };
        let truncated = || refuse("is cut off: the file ends inside a section");
        let mut artifact = Artifact {
            path: path.to_path_buf(),
            file,
            size,
            component: Vec::new(),
            manifest: None,
            layers: Vec::new(),
        };
        match &*artifact.read_some(0, PREAMBLE)? {
            b"\0asm\x0d\0\x01\0" => {}
            // A core module has layer 0.
            b"\0asm\x01\0\0\0" => {
                return Err(refuse("is a core WebAssembly module, not a component").into());
            }
            [0, b'a', b's', b'm', ..] => {
                return Err(refuse("is WebAssembly of a version that is not known here").into());
            }
            _ => return Err(refuse("is not a WebAssembly component").into()),
        }
        artifact.component.push(0..PREAMBLE);
        let mut start = PREAMBLE;
        while start < size {
            let head = artifact.read_some(start, SECTION_HEAD)?;
            let section = Section::parse(&head, start, size).ok_or_else(truncated)?;
            start = section.content.end;
            let name = match section.id {
                0 => artifact.read_some(section.content.start, NAME.min(section.content.len()))?,
                _ => Vec::new(),
            };
            match our_section(&name) {
                Some((MANIFEST_SECTION, skip)) => {
                    let content = artifact.read(&(section.content.start + skip..section.content.end))?;
                    let manifest: Manifest = serde_json::from_slice(&content).map_err(|error| {
                        let error = error.to_string();
                        refuse(&format!(
                            "has a manifest that can not be read: {}",
                            Printable(&error, MAX_QUOTED)
                        ))
                    })?;
                    if manifest.format > MANIFEST_FORMAT {
                        return Err(refuse("was built by a newer wsgi-wasm").into());
                    }
                    artifact.manifest = Some(manifest);
                }
                Some((name, skip)) => {
                    let layer = Layer::ALL
                        .into_iter()
                        .find(|layer| name.strip_prefix(LAYER_SECTION) == Some(layer.name()))
                        .ok_or_else(|| {
                            let name = Printable(name, MAX_QUOTED);
                            refuse(&format!("has a section `{name}` that this version does not know"))
                        })?;
                    artifact.layers.push((layer, section.content.start + skip..section.content.end));
                }
                None => match artifact.component.last_mut() {
                    Some(last) if last.end == section.start => last.end = section.content.end,
                    _ => artifact.component.push(section.start..section.content.end),
                },
            }
        }
        Ok(artifact)
    }

    /// The manifest, if the artifact has one.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// Size of the file in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Size of the component without our sections, in bytes.
    pub fn component_size(&self) -> usize {
        self.component.iter().map(Range::len).sum()
    }

    /// Size of each packed layer in bytes.
    pub fn layers(&self) -> impl Iterator<Item = (Layer, usize)> + '_ {
        self.layers.iter().map(|(layer, range)| (*layer, range.len()))
    }

    /// The component without our sections, if it has the digest that `digests`
    /// says: what is made of it is kept under that.
    ///
    /// # Errors
    ///
    /// If the file can not be read, or was changed.
    pub fn component(&self, digests: &Digests) -> Result<Vec<u8>> {
        let mut component = Vec::with_capacity(self.component_size());
        for range in &self.component {
            component.extend(self.read(range)?);
        }
        self.checked(component, &digests.component)
    }

    /// The digests of the artifact's parts.
    ///
    /// To compute them takes a good part of a start. So the cache keeps them by
    /// the file's [`Identity`].
    ///
    /// # Errors
    ///
    /// A [`UserError`] if they are not those that the manifest lists. If the
    /// file can not be read, or the cache not written.
    pub fn digests(&self, cache: &Cache) -> Result<Digests> {
        let digests = self.digests_at(SystemTime::now(), cache)?;
        self.compare(&digests).map_err(|reason| {
            UserError::new(format!("`{}` {reason}", self.path.display()))
                .remedy("copy the file again from where it was built, or build the app again")
        })?;
        Ok(digests)
    }

    /// Says what is not as the manifest lists it.
    fn compare(&self, digests: &Digests) -> Result<(), String> {
        let Some(manifest) = &self.manifest else { return Ok(()) };
        if manifest.component.as_ref().is_some_and(|listed| *listed != digests.component) {
            return Err("is damaged: its code and memory are not what was built".into());
        }
        for listed in &manifest.layers {
            let mut found =
                self.layers.iter().zip(&digests.layers).filter(|((layer, _), _)| *layer == listed.name);
            let name = listed.name.name();
            match found.next() {
                None => return Err(format!("is cut off or damaged: the layer `{name}` is missing")),
                Some((_, digest)) if *digest != listed.sha256 => {
                    return Err(format!("is damaged: the layer `{name}` is not what was built"));
                }
                Some(_) if found.next().is_some() => return Err(format!("has the layer `{name}` twice")),
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn digests_at(&self, now: SystemTime, cache: &Cache) -> Result<Digests> {
        let metadata = self.file.metadata().map_err(|error| unreadable(&self.path, &error))?;
        let identity = serde_json::to_vec(&Identity::of(&metadata))?;
        let key = Key::new(Bucket::Digests).with(identity).finish();
        if let Some(known) = cache.get(Bucket::Digests, &key)
            && let Some(known) = fs::read(known).ok().and_then(|known| serde_json::from_slice(&known).ok())
        {
            return Ok(known);
        }
        let digests = self.compute_digests()?;
        // Within the clock's steps two changes can have the same time.
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if i64::try_from(now).is_ok_and(|now| now > metadata.ctime() + 2) {
            let text = serde_json::to_vec(&digests)?;
            cache.get_or_make(Bucket::Digests, &key, |path| Ok(fs::write(path, text)?))?;
        }
        Ok(digests)
    }

    fn compute_digests(&self) -> Result<Digests> {
        let digest = |ranges: &[Range<usize>]| -> Result<String> {
            let mut digest = Sha256::new();
            let mut block = vec![0; 1 << 20];
            for range in ranges {
                for start in range.clone().step_by(block.len()) {
                    let block = &mut block[..(range.end - start).min(1 << 20)];
                    self.fill(start, block)?;
                    digest.update(block);
                }
            }
            Ok(cache::hex(&digest.finalize()))
        };
        Ok(Digests {
            component: digest(&self.component)?,
            layers: self
                .layers
                .iter()
                .map(|(_, range)| digest(std::slice::from_ref(range)))
                .collect::<Result<_>>()?,
        })
    }

    /// Unpacks the layers, each once per digest and machine, into archives
    /// that [`Image`] reads, and returns where they are.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if a layer is damaged or holds more than plain files.
    pub fn unpack_layers(&self, cache: &Cache, digests: &Digests) -> Result<Vec<(Layer, PathBuf)>> {
        let layers = self.layers.iter().zip(&digests.layers);
        layers
            .map(|((layer, range), digest)| {
                let path = cache.get_or_make(Bucket::Layers, digest, |path| {
                    unpack(&self.checked(self.read(range)?, digest)?, path)
                        .map_err(|error| {
                            UserError::new(format!(
                                "the layer `{}` of `{}` can not be unpacked: {error:#}",
                                layer.name(),
                                self.path.display()
                            ))
                            .remedy("build the app again")
                        })
                        .map_err(Into::into)
                })?;
                Ok((*layer, path))
            })
            .collect()
    }

    /// `bytes`, if they have this digest.
    fn checked(&self, bytes: Vec<u8>, digest: &str) -> Result<Vec<u8>> {
        if cache::sha256(&bytes) != digest {
            return Err(UserError::new(format!("`{}` was changed while it was read", self.path.display()))
                .remedy("replace an app's file by a rename, or wait until it is written")
                .into());
        }
        Ok(bytes)
    }

    /// The bytes in `range`.
    fn read(&self, range: &Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        self.fill(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Up to `length` bytes at `start`, fewer at the end of the file.
    fn read_some(&self, start: usize, length: usize) -> Result<Vec<u8>> {
        self.read(&(start..self.size.min(start + length)))
    }

    fn fill(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(bytes, start as u64);
        read.map_err(|error| unreadable(&self.path, &error).into())
    }
}

fn unreadable(path: &Path, error: &io::Error) -> UserError {
    UserError::new(format!("can not read the app `{}`: {error}", path.display())).remedy(match error.kind() {
        // Also what a server hears that has confined itself.
        io::ErrorKind::PermissionDenied => {
            "put it beside the configuration or below one of its `roots`, and let the server read it"
        }
        _ => "build one with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`",
    })
}

/// Unpacks an untrusted layer into the new file `path`.
fn unpack(packed: &[u8], path: &Path) -> Result<()> {
    let mut file = File::create_new(path).context("failed to create its file")?;
    let unpacked = zstd::Decoder::new(packed)?;
    let size = io::copy(&mut unpacked.take(LAYER_MAX_BYTES), &mut file)?;
    if size == LAYER_MAX_BYTES {
        bail!("it is larger than {LAYER_MAX_BYTES} bytes");
    }
    Image::read(path).map(drop)
}

/// The name of a custom section of ours, of which `head` is the beginning, and
/// how many bytes come before its content.
fn our_section(head: &[u8]) -> Option<(&str, usize)> {
    let mut at = 0;
    let length = read_leb128(head, &mut at)?;
    let name = std::str::from_utf8(head.get(at..at.checked_add(length)?)?).ok()?;
    name.starts_with("wsgi-wasm:").then_some((name, at + length))
}

/// Reads an unsigned LEB128 number of at most 32 bits and moves `at` behind it.
fn read_leb128(bytes: &[u8], at: &mut usize) -> Option<usize> {
    let mut value = 0u64;
    for shift in (0..35).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return u32::try_from(value).ok().map(|value| value as usize);
        }
    }
    None
}

/// Appends an unsigned LEB128 number.
fn write_leb128(mut value: usize, out: &mut Vec<u8>) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const EMPTY_COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

    fn manifest() -> Manifest {
        Manifest {
            format: MANIFEST_FORMAT,
            application: "app:app".into(),
            python: "3.14.0".into(),
            tools: BTreeMap::new(),
            packages: Vec::new(),
            warmup: Vec::new(),
            environment: BTreeMap::new(),
            static_files: BTreeMap::new(),
            inputs: String::new(),
            component: None,
            layers: Vec::new(),
        }
    }

    fn open(bytes: &[u8]) -> Result<Artifact> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.wasm");
        fs::write(&path, bytes).unwrap();
        Artifact::open(&path)
    }

    #[test]
    fn digests_are_kept_as_long_as_the_file_is_the_same() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let path = home.path().join("app.wasm");
        fs::write(&path, EMPTY_COMPONENT).unwrap();
        let (now, later) = (SystemTime::now(), SystemTime::now() + Duration::from_secs(10));
        let digests = |time| Artifact::open(&path).unwrap().digests_at(time, &cache).unwrap();
        let kept = || fs::read_dir(cache.root().join(Bucket::Digests.directory()));
        let right = digests(now);
        assert!(kept().is_err(), "the file may still change without a trace");
        assert_eq!(digests(later), right);
        let entries = kept().unwrap().map(|entry| entry.unwrap().path());
        let entry = entries.filter(|path| path.is_file()).collect::<Vec<_>>();
        let marked = Digests { component: "kept".into(), layers: Vec::new() };
        fs::write(&entry[0], serde_json::to_vec(&marked).unwrap()).unwrap();
        assert_eq!(digests(later), marked);
        let changed = assemble(EMPTY_COMPONENT.to_vec(), &manifest(), &[layer_of(&[("a", "1")])]).unwrap();
        fs::write(&path, changed).unwrap();
        assert_eq!(digests(later).layers.len(), 1);
    }

    fn layer_of(files: &[(&str, &str)]) -> PackedLayer {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        PackedLayer::pack(Layer::App, root.path()).unwrap()
    }

    #[test]
    fn what_goes_in_comes_out() {
        let layer = layer_of(&[("b/c.txt", "see"), ("a.py", "x = 1")]);
        let bytes = assemble(EMPTY_COMPONENT.to_vec(), &manifest(), std::slice::from_ref(&layer)).unwrap();
        let artifact = open(&bytes).unwrap();
        assert_eq!(artifact.manifest().unwrap().application, "app:app");
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let digests = artifact.digests(&cache).unwrap();
        assert_eq!(digests.component, cache::sha256(EMPTY_COMPONENT));
        assert_eq!(digests.layers, [cache::sha256(&layer.bytes)]);
        assert_eq!(artifact.component(&digests).unwrap(), EMPTY_COMPONENT);
        let other = Digests { component: "other".into(), ..digests.clone() };
        assert!(artifact.component(&other).unwrap_err().to_string().contains("was changed"));
        let layers = artifact.unpack_layers(&cache, &digests).unwrap();
        assert_eq!(layers.len(), 1);
        let image = Image::read(&layers[0].1).unwrap();
        assert_eq!(image.stat(image.look_up(Image::ROOT, "b/c.txt").unwrap()).size, 3);
    }

    #[test]
    fn what_the_manifest_lists_must_be_there() {
        let layer = layer_of(&[("a.py", "x = 1")]);
        let listed = Manifest {
            component: Some(cache::sha256(EMPTY_COMPONENT)),
            layers: vec![layer.summary()],
            ..manifest()
        };
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let digests = |manifest: &Manifest, layers: &[PackedLayer]| {
            let bytes = assemble(EMPTY_COMPONENT.to_vec(), manifest, layers).unwrap();
            open(&bytes).unwrap().digests(&cache)
        };
        let whole = std::slice::from_ref(&layer);
        digests(&listed, whole).unwrap();
        // A layer that is not listed does no harm.
        digests(&manifest(), whole).unwrap();
        let other = layer_of(&[("a.py", "x = 2")]);
        let changed = Manifest { component: Some(cache::sha256(b"other")), ..listed.clone() };
        for (found, reason) in [
            (digests(&listed, &[]), "cut off or damaged: the layer `app` is missing"),
            (digests(&listed, std::slice::from_ref(&other)), "the layer `app` is not what was built"),
            (digests(&listed, &[layer.clone(), other]), "has the layer `app` twice"),
            (digests(&changed, whole), "its code and memory"),
        ] {
            let error = found.unwrap_err();
            assert!(error.is::<UserError>() && error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn a_pipe_is_refused_without_waiting() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("app.wasm");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = Artifact::open(&path).err().unwrap();
        assert!(error.is::<UserError>() && error.to_string().contains("not a regular file"), "{error}");
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let one = layer_of(&[("a", "1"), ("b/c", "2")]);
        let two = layer_of(&[("b/c", "2"), ("a", "1")]);
        assert_eq!(one.bytes, two.bytes);
    }

    #[test]
    fn a_file_that_is_no_artifact_is_refused_with_the_reason() {
        let whole = assemble(EMPTY_COMPONENT.to_vec(), &manifest(), &[]).unwrap();
        for (bytes, reason) in [
            (b"GIF89a".to_vec(), "not a WebAssembly component"),
            (Vec::new(), "not a WebAssembly component"),
            (b"\0asm\x01\0\0\0".to_vec(), "core WebAssembly module"),
            (b"\0asm\x0e\0\x01\0".to_vec(), "version that is not known"),
            (whole[..whole.len() - 1].to_vec(), "cut off"),
            (b"\0asm\x0d\0\x01\0\x01\xff\xff\xff\xff\xff\xff".to_vec(), "cut off"),
        ] {
            let error = open(&bytes).err().unwrap();
            assert!(error.is::<UserError>());
            assert!(error.to_string().contains(reason), "{error}");
            assert!(error.to_string().contains("app.wasm"), "{error}");
        }
    }

    #[test]
    fn a_layer_that_points_elsewhere_is_refused() {
        let hostile = |name: &str, kind: tar::EntryType| {
            let mut archive = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            // Written by hand, since the library itself refuses such names.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            if kind == tar::EntryType::Symlink {
                header.set_link_name("/etc/passwd").unwrap();
            }
            header.set_cksum();
            archive.append(&header, &[][..]).unwrap();
            archive.into_inner().unwrap().finish().unwrap()
        };
        for (name, kind) in [
            ("../out", tar::EntryType::Regular),
            ("/etc/out", tar::EntryType::Regular),
            ("a/../../out", tar::EntryType::Regular),
            ("link", tar::EntryType::Symlink),
            ("hard", tar::EntryType::Link),
            ("fifo", tar::EntryType::Fifo),
        ] {
            let home = tempfile::tempdir().unwrap();
            let target = home.path().join("layer");
            assert!(unpack(&hostile(name, kind), &target).is_err(), "{name}");
            assert!(!home.path().join("out").exists());
        }
    }
}
