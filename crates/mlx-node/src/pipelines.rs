//! `[[pipeline]]` in the configuration file: models that several nodes hold together.
//!
//! Every node may have the same file: one that a pipeline names, or that may belong to it, is a member, and its model is the
//! pipeline's.

use crate::{
    config::{plain_text, unknown},
    values::{Auto, Bytes, Goal, Links, List, Setting, quoted},
};
use node::pipeline::{self, PipelineMembers, RdmaLink};
use std::ops::Range;
use toml::de::DeTable;
use types::limits::PIPELINE_MEMBERS_MAX;

/// Tokens of KV where nothing is said: sixteen conversations of 2000 tokens.
const KV_TOKENS: u32 = 32_768;
/// Fewer tokens of KV are of no use.
const KV_TOKENS_MIN: u32 = 1024;
/// Pipelines in a file; a node is a member of one.
const PIPELINES_MAX: usize = 64;

const NAMES: &[&str] =
    &["model", "members", "goal", "rows", "kv_tokens", "memory", "forced", "links", "devices"];

/// One `[[pipeline]]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Pipeline {
    /// A path or a hub id.
    pub(crate) model: String,
    /// Names of nodes; none: all that have this pipeline in their file.
    pub(crate) members: Auto<List<String>>,
    pub(crate) goal: Goal,
    /// Rows at once; by default as many as `max_batch`.
    pub(crate) rows: Auto<u32>,
    pub(crate) kv_tokens: u32,
    /// The most memory for weights and KV on this node.
    pub(crate) memory: Auto<Bytes>,
    pub(crate) forced: bool,
    pub(crate) links: Links,
    /// Of JACCL: the ends of all cables.
    pub(crate) devices: List<Device>,
}

/// "FROM:TO:DEVICE": what the member FROM calls its end of a cable to the member TO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device(RdmaLink);

impl Setting for Device {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = || "FROM:TO:DEVICE, such as studio-1:studio-2:rdma_en5, is expected".to_owned();
        let parts: Vec<&str> = text.split(':').collect();
        let [from, to, device] = parts[..] else { return Err(expected()) };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if from.is_empty() || to.is_empty() || from == to || device.is_empty() || !device.chars().all(plain) {
            return Err(expected());
        }
        Ok(Self(RdmaLink { from: from.to_owned(), to: to.to_owned(), device: device.to_owned() }))
    }

    fn to_toml(&self) -> String {
        quoted(&format!("{}:{}:{}", self.0.from, self.0.to, self.0.device))
    }
}

impl Pipeline {
    /// Reads a table; an error says at which byte of the file it is.
    pub(crate) fn parse(table: &DeTable<'_>, place: &Range<usize>) -> Result<Self, (usize, String)> {
        let mut pipeline = Self {
            model: String::new(),
            members: Auto::Auto,
            goal: Goal::Throughput,
            rows: Auto::Auto,
            kv_tokens: KV_TOKENS,
            memory: Auto::Auto,
            forced: false,
            links: Links::Tunnel,
            devices: List(Vec::new()),
        };
        for (key, value) in table {
            let name: &str = key.get_ref();
            let set = plain_text(value.get_ref()).and_then(|text| pipeline.set(name, &text));
            set.map_err(|message| (key.span().start, format!("pipeline: {message}")))?;
        }
        pipeline.check().map_err(|message| (place.start, message))?;
        Ok(pipeline)
    }

    fn set(&mut self, name: &str, text: &str) -> Result<(), String> {
        fn read<T: Setting>(name: &str, text: &str) -> Result<T, String> {
            T::parse(text).map_err(|expected| format!("{name} = {text:?}: {expected}"))
        }
        match name {
            "model" => self.model = read(name, text)?,
            "members" => self.members = read(name, text)?,
            "goal" => self.goal = read(name, text)?,
            "rows" => self.rows = read(name, text)?,
            "kv_tokens" => self.kv_tokens = read(name, text)?,
            "memory" => self.memory = read(name, text)?,
            "forced" => self.forced = read(name, text)?,
            "links" => self.links = read(name, text)?,
            "devices" => self.devices = read(name, text)?,
            _ => return Err(unknown("setting", name, NAMES)),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if self.model.is_empty() {
            return Err("pipeline: model is missing: a folder, a .gguf file or a hub id".to_owned());
        }
        let of = format!("pipeline of {:?}", self.model);
        if self.kv_tokens < KV_TOKENS_MIN {
            return Err(format!(
                "{of}: kv_tokens = {}: at least {KV_TOKENS_MIN} are expected",
                self.kv_tokens
            ));
        }
        let (jaccl, List(devices)) = (self.links == Links::Jaccl, &self.devices);
        if !jaccl && !devices.is_empty() {
            return Err(format!(
                "{of}: devices are for links = \"jaccl\", and links = {}",
                self.links.to_toml()
            ));
        }
        let Auto::Fixed(List(members)) = &self.members else {
            return match jaccl {
                true => Err(format!("{of}: links = \"jaccl\" needs members by name, as their cables are")),
                false => Ok(()),
            };
        };
        if !(2..=PIPELINE_MEMBERS_MAX).contains(&members.len()) {
            return Err(format!(
                "{of}: members = {members:?}: from 2 to {PIPELINE_MEMBERS_MAX} names are expected, or \"auto\""
            ));
        }
        let twice = members.iter().enumerate().find(|(at, name)| members[..*at].contains(name));
        if let Some((_, name)) = twice {
            return Err(format!("{of}: members: {name:?} is named twice"));
        }
        let stranger = |Device(link): &&Device| !members.contains(&link.from) || !members.contains(&link.to);
        if let Some(device) = devices.iter().find(stranger) {
            return Err(format!("{of}: devices: {}: both ends are to be members", device.to_toml()));
        }
        let from = |name: &&String| devices.iter().any(|Device(link)| link.from == **name);
        match members.iter().find(|name| jaccl && !from(name)) {
            Some(name) => Err(format!("{of}: devices: none of {name:?}, which links = \"jaccl\" needs")),
            None => Ok(()),
        }
    }

    /// The same in the node's terms.
    pub(crate) fn links(&self) -> pipeline::Links {
        match self.links {
            Links::Tunnel => pipeline::Links::Tunnels,
            Links::Direct => pipeline::Links::Direct,
            Links::Jaccl => {
                pipeline::Links::Jaccl(self.devices.0.iter().map(|Device(link)| link.clone()).collect())
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        match &self.members {
            Auto::Auto => true,
            Auto::Fixed(List(members)) => members.iter().any(|member| member == name),
        }
    }

    /// The same in the node's terms.
    pub(crate) fn members(&self) -> PipelineMembers {
        match &self.members {
            Auto::Auto => PipelineMembers::Auto,
            Auto::Fixed(List(members)) => PipelineMembers::Named(members.clone()),
        }
    }

    /// Names and values as TOML.
    pub(crate) fn shown(&self) -> Vec<(&'static str, String)> {
        let values = [
            self.model.to_toml(),
            self.members.to_toml(),
            self.goal.to_toml(),
            self.rows.to_toml(),
            self.kv_tokens.to_toml(),
            self.memory.to_toml(),
            self.forced.to_toml(),
            self.links.to_toml(),
            self.devices.to_toml(),
        ];
        NAMES.iter().copied().zip(values).collect()
    }
}

/// Why a node cannot have these pipelines.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PipelinesError {
    #[error("{count} pipelines; at most {PIPELINES_MAX}")]
    TooMany { count: usize },
    #[error(
        "node {name:?} would be a member of two pipelines, of {first:?} and of {second:?}; it can be of one"
    )]
    Two { name: String, first: String, second: String },
    #[error(
        "model = {model:?}, but node {name:?} is a member of the pipeline of {pipeline:?}: leave `model` out, or the node out \
         of the pipeline's members"
    )]
    OtherModel { name: String, model: String, pipeline: String },
    #[error(
        "node {name:?} is a member of no pipeline and has no model: add it to the members of one ({members}), or set `model`"
    )]
    NotAMember { name: String, members: String },
}

/// The pipeline that node `name` is a member of, where its own model is `model`, if any.
pub(crate) fn of_node<'a>(
    pipelines: &'a [Pipeline],
    name: &str,
    model: &str,
) -> Result<Option<&'a Pipeline>, PipelinesError> {
    if pipelines.len() > PIPELINES_MAX {
        return Err(PipelinesError::TooMany { count: pipelines.len() });
    }
    let mut own = pipelines.iter().filter(|pipeline| pipeline.has(name));
    let (first, second) = (own.next(), own.next());
    let name = name.to_owned();
    match (first, second) {
        (Some(first), Some(second)) => {
            let (first, second) = (first.model.clone(), second.model.clone());
            Err(PipelinesError::Two { name, first, second })
        }
        (Some(pipeline), None) if !model.is_empty() && model != pipeline.model => {
            let (model, pipeline) = (model.to_owned(), pipeline.model.clone());
            Err(PipelinesError::OtherModel { name, model, pipeline })
        }
        (Some(pipeline), None) => Ok(Some(pipeline)),
        (None, _) if model.is_empty() && !pipelines.is_empty() => {
            let members = pipelines.iter().map(|pipeline| pipeline.members.to_toml());
            Err(PipelinesError::NotAMember { name, members: members.collect::<Vec<_>>().join(", ") })
        }
        (None, _) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_toml;
    use std::{path::Path, slice::from_ref};

    fn pipelines(text: &str) -> Result<Vec<Pipeline>, String> {
        let config = from_toml(text, Path::new("c.toml")).map_err(|error| error.to_string())?;
        Ok(config.resolve().pipelines)
    }

    #[test]
    fn what_is_left_out_has_a_default_and_what_is_shown_can_be_read_back() {
        let all = pipelines(
            "[[pipeline]]\nmodel = \"a/b\"\n[[pipeline]]\nmodel = \"c\"\nmembers = [\"x\", \"y\"]\ngoal = \"latency\"\n\
             rows = 8\nkv_tokens = 4096\nmemory = \"8 GiB\"\nforced = true\nlinks = \"jaccl\"\n\
             devices = [\"x:y:rdma_en5\", \"y:x:rdma_en3\"]",
        );
        let all = all.expect("valid");
        assert_eq!(all[0].members, Auto::Auto);
        assert_eq!((all[0].kv_tokens, all[0].goal), (KV_TOKENS, Goal::Throughput));
        assert_eq!(all[1].members(), PipelineMembers::Named(vec!["x".to_owned(), "y".to_owned()]));
        assert_eq!(all[0].links(), pipeline::Links::Tunnels);
        let link = |from: &str, to: &str, device: &str| RdmaLink {
            from: from.to_owned(),
            to: to.to_owned(),
            device: device.to_owned(),
        };
        let links = vec![link("x", "y", "rdma_en5"), link("y", "x", "rdma_en3")];
        assert_eq!(all[1].links(), pipeline::Links::Jaccl(links));
        assert_eq!((all[1].goal, all[1].memory.clone()), (Goal::Latency, Auto::Fixed(Bytes(8 << 30))));
        for pipeline in all {
            let lines = pipeline.shown().into_iter().map(|(name, value)| format!("{name} = {value}\n"));
            let text: String = std::iter::once("[[pipeline]]\n".to_owned()).chain(lines).collect();
            assert_eq!(pipelines(&text), Ok(vec![pipeline]), "{text}");
        }
    }

    #[test]
    fn the_example_lists_every_setting_with_its_default() {
        let example = include_str!("../../../cluster.example.toml");
        let (_, rest) = example.split_once("\n# [[pipeline]]").expect("a pipeline in a comment");
        let settings = rest.lines().filter_map(|line| line.strip_prefix("# ")).filter_map(|line| {
            line.split_once(" = ").filter(|(name, _)| NAMES.contains(name)).map(|(_, value)| value)
        });
        let settings: Vec<&str> = settings.collect();
        let named = ["\"mlx-community/Llama-3.3-70B-Instruct-4bit\"", "[\"studio-1\", \"studio-2\"]"];
        assert_eq!(settings[..2], named);
        let defaults = pipelines("[[pipeline]]\nmodel = \"m\"").expect("valid")[0].shown();
        let defaults: Vec<&str> = defaults[2..].iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(settings[2..], defaults);
    }

    #[test]
    fn what_is_wrong_is_told_with_line_and_value() {
        let check = |text: &str, expected: &str| {
            let error = pipelines(text).expect_err(text);
            assert_eq!(error, format!("c.toml:{expected}"));
        };
        let with = |line: &str| format!("name = \"n\"\n[[pipeline]]\nmodel = \"m\"\n{line}");
        check("[[pipeline]]\nrows = 8", "1: pipeline: model is missing: a folder, a .gguf file or a hub id");
        check(&with("modl = 1"), "4: pipeline: unknown setting \"modl\"; did you mean \"model\"?");
        check(
            &with("goal = \"speed\""),
            "4: pipeline: goal = \"speed\": one of \"throughput\", \"latency\" is expected",
        );
        check(
            &with("rows = 0"),
            "4: pipeline: rows = \"0\": \"auto\", or a whole number from 1 to 4294967295 is expected",
        );
        check(
            &with("members = [\"a\"]"),
            "2: pipeline of \"m\": members = [\"a\"]: from 2 to 8 names are expected, or \"auto\"",
        );
        check(
            &with("members = [\"a\", \"b\", \"a\"]"),
            "2: pipeline of \"m\": members: \"a\" is named twice",
        );
        check(&with("kv_tokens = 12"), "2: pipeline of \"m\": kv_tokens = 12: at least 1024 are expected");
        check(
            &with("links = \"wire\""),
            "4: pipeline: links = \"wire\": one of \"tunnel\", \"direct\", \"jaccl\" is expected",
        );
        check(
            &with("links = \"jaccl\""),
            "2: pipeline of \"m\": links = \"jaccl\" needs members by name, as their cables are",
        );
        check(
            &with("devices = [\"a:b:rdma_en5\"]"),
            "2: pipeline of \"m\": devices are for links = \"jaccl\", and links = \"tunnel\"",
        );
        let jaccl = |devices: &str| {
            with(&format!("members = [\"a\", \"b\"]\nlinks = \"jaccl\"\ndevices = {devices}"))
        };
        check(
            &jaccl("[\"a:b\"]"),
            "6: pipeline: devices = \"a:b\": FROM:TO:DEVICE, such as studio-1:studio-2:rdma_en5, is expected",
        );
        check(
            &jaccl("[\"a:c:rdma_en5\"]"),
            "2: pipeline of \"m\": devices: \"a:c:rdma_en5\": both ends are to be members",
        );
        check(
            &jaccl("[\"a:b:rdma_en5\"]"),
            "2: pipeline of \"m\": devices: none of \"b\", which links = \"jaccl\" needs",
        );
        check("pipeline = 3", "1: pipeline: write [[pipeline]] above its settings, once for each pipeline");
        check(
            "[pipeline]\nmodel = \"m\"",
            "1: pipeline: write [[pipeline]] above its settings, once for each pipeline",
        );
        check("pipeline = [3]", "1: pipeline: write [[pipeline]] above its settings, once for each pipeline");
    }

    #[test]
    fn a_node_is_a_member_of_one_pipeline_and_has_its_model() {
        let of = |model: &str, members: &[&str]| {
            let names = List(members.iter().map(|name| (*name).to_owned()).collect());
            let members = if members.is_empty() { "\"auto\"".to_owned() } else { names.to_toml() };
            let text = format!("[[pipeline]]\nmodel = \"{model}\"\nmembers = {members}");
            pipelines(&text).expect("valid").remove(0)
        };
        let check = |pipelines: &[Pipeline], model: &str, expected: Result<Option<&str>, &str>| {
            let got = of_node(pipelines, "n", model);
            match (got, expected) {
                (Ok(pipeline), Ok(expected)) => {
                    assert_eq!(pipeline.map(|pipeline| pipeline.model.as_str()), expected);
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{got:?}, not {expected:?}"),
            }
        };
        let (named, other, auto) = (of("a", &["n", "o"]), of("b", &["o", "p"]), of("c", &[]));
        check(&[], "m", Ok(None));
        check(&[], "", Ok(None));
        check(&[named.clone(), other.clone()], "", Ok(Some("a")));
        check(from_ref(&named), "a", Ok(Some("a")));
        check(
            from_ref(&named),
            "m",
            Err("model = \"m\", but node \"n\" is a member of the pipeline of \"a\""),
        );
        check(from_ref(&other), "m", Ok(None));
        check(from_ref(&other), "", Err("member of no pipeline and has no model"));
        check(from_ref(&auto), "", Ok(Some("c")));
        check(&[named, auto], "", Err("two pipelines, of \"a\" and of \"c\""));
        check(&vec![other; 65], "m", Err("65 pipelines"));
    }
}
