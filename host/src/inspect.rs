//! The `inspect` command: what is in an artifact.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde::Serialize;
use wasmtime::component::types::ComponentItem;

use crate::artifact::{Artifact, Manifest};
use crate::cache::Cache;
use crate::cli::InspectArgs;
use crate::code::{Layout, Loader};
use crate::engine;
use crate::units::approximate;

/// All that `inspect --json` prints.
#[derive(Serialize)]
struct Description {
    path: String,
    size: usize,
    component: ComponentDescription,
    layers: Vec<LayerDescription>,
    manifest: Option<Manifest>,
}

#[derive(Serialize)]
struct ComponentDescription {
    size: usize,
    sha256: String,
    /// How the code is shared with other apps on this host.
    code: Layout,
    /// Interfaces that the host must provide.
    imports: Vec<String>,
    /// Interfaces that the app provides.
    exports: Vec<String>,
}

#[derive(Serialize)]
struct LayerDescription {
    name: &'static str,
    guest_path: &'static str,
    packed_size: usize,
}

/// Prints the description.
///
/// # Errors
///
/// A [`crate::error::UserError`] if the file is not a component.
#[expect(clippy::print_stdout, reason = "this is the command's output")]
pub fn run(args: &InspectArgs) -> Result<()> {
    let description = describe(&Artifact::open(&args.app)?)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&description)?);
    } else {
        print!("{}", text(&description)?);
    }
    Ok(())
}

fn describe(artifact: &Artifact) -> Result<Description> {
    let cache = Cache::open()?;
    let engine = engine::compiler().map_err(anyhow::Error::from)?;
    let digests = artifact.digests(&cache)?;
    let code = Loader::new(&engine, &cache).load(artifact, &digests, None, &|_| {})?;
    let component_type = code.component.component_type();
    Ok(Description {
        path: artifact.path.display().to_string(),
        size: artifact.size(),
        component: ComponentDescription {
            size: artifact.component_size(),
            sha256: digests.component,
            code: code.layout,
            imports: component_type
                .imports(&engine)
                // A skeleton's import of the app's own part is met by the app.
                .filter(|(_, item)| !matches!(item.ty, ComponentItem::Module(_)))
                .map(|(name, _)| name.to_owned())
                .collect(),
            exports: component_type
                .exports(&engine)
                // componentize-py adds one without a package, which is its own.
                .filter(|(name, _)| name.contains(':'))
                .filter(|(_, item)| {
                    matches!(item.ty, ComponentItem::ComponentInstance(_) | ComponentItem::ComponentFunc(_))
                })
                .map(|(name, _)| name.to_owned())
                .collect(),
        },
        layers: artifact
            .layers()
            .map(|(layer, size)| LayerDescription {
                name: layer.name(),
                guest_path: layer.guest_path(),
                packed_size: size,
            })
            .collect(),
        manifest: artifact.manifest().cloned(),
    })
}

fn text(description: &Description) -> Result<String> {
    let mut out = String::new();
    let size = |bytes: usize| approximate(bytes as u64);
    let mut write = || -> std::fmt::Result {
        writeln!(out, "{} ({})", description.path, size(description.size))?;
        if let Some(manifest) = &description.manifest {
            writeln!(out, "application  {}", manifest.application)?;
            writeln!(out, "python       {}", manifest.python)?;
            for (tool, version) in &manifest.tools {
                writeln!(out, "built by     {tool} {version}")?;
            }
            for path in &manifest.warmup {
                writeln!(out, "warmed up    {path}")?;
            }
            for (name, value) in &manifest.environment {
                writeln!(out, "environment  {name}={value}")?;
            }
            for (prefix, directory) in &manifest.static_files {
                writeln!(out, "static       {prefix} from {directory}")?;
            }
            writeln!(out, "\npackages")?;
            for package in &manifest.packages {
                let license = package.license.as_deref().unwrap_or("-");
                writeln!(out, "  {:<24} {:<12} {license}", package.name, package.version)?;
            }
        }
        writeln!(out, "\nparts")?;
        writeln!(out, "  {:<24} {}", "snapshot and code", size(description.component.size))?;
        for layer in &description.layers {
            let name = format!("layer {} at {}", layer.name, layer.guest_path);
            writeln!(out, "  {name:<24} {}", size(layer.packed_size))?;
        }
        writeln!(out, "\ncode         {}", description.component.code)?;
        writeln!(out, "\nimports")?;
        for import in &description.component.imports {
            writeln!(out, "  {import}")?;
        }
        writeln!(out, "\nexports")?;
        for export in &description.component.exports {
            writeln!(out, "  {export}")?;
        }
        Ok(())
    };
    write().context("failed to format the description")?;
    Ok(out)
}
