//! A mixture of experts: a router takes some for each token, all of whose products are one.

use super::{
    names::PARTS,
    spec::{ExpertsSpec, Groups, Routing, Scores},
};
use crate::{
    checkpoint::{LoadError, Mode, Packed, Packing, Tensors, Weight},
    layers::{Between, Compute, Gate, Linear, Path},
    products::{self, Weights},
    raw,
};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{
        argpartition_axis, argsort, concatenate, gather_mm, gt,
        indexing::{take_along_axis, topk_axis},
        select, sigmoid, softmax_axis, stack,
    },
};

/// From how many pairs of token and expert on they are sorted by expert: then each expert's weights are read once, which
/// fewer pairs do not win back.
const SORTED_PAIRS: i32 = 64;

/// From how many rows of each expert on its weights are made dense first, in multiples of those from which a single
/// matrix's are: MLX's gathered products on CUDA take as long for each pair, however many there are of one expert (H100,
/// 128 experts: the same at 13 rows of each for gate and up, at 20 for down).
const DENSE_EXPERT_ROWS: i32 = 2;

/// Up to how many rows of each expert, on average, the kernel of few rows is taken: it reads an expert's weights once for
/// eight of them.
const OWN_EXPERT_ROWS: i32 = 16;

/// The weights of one layer's experts.
#[derive(Debug)]
pub(super) struct Experts {
    router: Linear,
    /// Of [`Scores::Sigmoid`]: what is added before experts are taken, `[experts]`.
    correction: Option<Array>,
    routing: Routing,
    each: i32,
    /// Gate and up side by side, `[experts, 2 · inner, hidden]`.
    gate_up: Stack,
    down: Stack,
    gate: Gate,
    shared: Option<Shared>,
}

/// The expert of every token.
#[derive(Debug)]
struct Shared {
    gate_up: Linear,
    down: Linear,
}

/// One matrix for each expert, and what is added to its product.
#[derive(Debug)]
struct Stack {
    weight: Weight,
    bias: Option<Array>,
}

impl Experts {
    pub(super) fn load(
        tensors: &mut Tensors,
        layer: &str,
        spec: &ExpertsSpec,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let prefix = format!("{layer}{}.", spec.prefix);
        let router = Linear::load(tensors, &[format!("{prefix}{}", spec.router)], compute)?;
        let sigmoid = spec.routing.scores == Scores::Sigmoid;
        let correction = format!("{prefix}{}.e_score_correction_bias", spec.router);
        let correction = sigmoid.then(|| tensors.take(&correction)).transpose()?;
        let correction = correction.map(|bias| bias.as_dtype(Dtype::Float32)).transpose()?;
        let [gate, up, down] = [0, 1, 2].map(|part| Stack::load(tensors, &prefix, spec, part));
        let (gate_up, down) = (Stack::joined(gate?, up?, compute)?, down?.applied(compute)?);
        let shared = spec.shared.map(|name| -> std::result::Result<_, LoadError> {
            let part = |part: &str| format!("{prefix}{name}.{part}");
            let gate_up = Linear::load(tensors, &[part("gate_proj"), part("up_proj")], compute)?;
            let down = Linear::load(tensors, &[part("down_proj")], compute)?;
            Ok(Shared { gate_up, down })
        });
        let (routing, each, gate) = (spec.routing, spec.each, spec.gate);
        let shared = shared.transpose()?;
        Ok(Self { router, correction, routing, each, gate_up, down, gate, shared })
    }

    /// `x [tokens, hidden]`, normalized, to the same.
    pub(super) fn forward(&self, x: &Array, compute: Compute) -> Result<Array> {
        let (tokens, hidden, each) = (x.dim(0), x.dim(1), self.each);
        let (experts, weights) = self.route(x)?;
        let pairs = tokens * each;
        let made = if pairs >= SORTED_PAIRS {
            let experts = experts.reshape(&[pairs])?;
            let order = argsort(&experts)?;
            let token = order.floor_divide(Array::from_slice(&[each as u32], &[1]))?;
            let x = x.take_axis(token, 0)?.reshape(&[pairs, 1, hidden])?;
            let made = self.products(&x, &experts.take_axis(&order, 0)?, true, compute)?;
            made.take_axis(argsort(&order)?, 0)?
        } else {
            let x = x.reshape(&[tokens, 1, 1, hidden])?;
            self.products(&x, &experts, false, compute)?
        };
        let made = made.reshape(&[tokens, each, hidden])?;
        let weights = weights.as_dtype(made.dtype())?.expand_dims(-1)?;
        let made = made.multiply(weights)?.sum_axis(1, false)?;
        match &self.shared {
            Some(Shared { gate_up, down }) => {
                let gated = Between { gated: Some(Gate::Silu), ..Between::default() };
                let onto = Between { added: Some(&made), ..Between::default() };
                down.forward(&gate_up.forward(x, gated)?, onto)
            }
            None => Ok(made),
        }
    }

    /// `x [.., 1, hidden]` through the expert of each.
    fn products(&self, x: &Array, experts: &Array, sorted: bool, compute: Compute) -> Result<Array> {
        if let Some((gate_up, down)) = self.own(experts, x.dtype(), compute) {
            let x = x.reshape(&[-1, x.dim(-1)])?;
            let gated = products::gathered(&x, experts, gate_up, true)?;
            return products::gathered(&gated, experts, down, false);
        }
        let gate_up = self.gate_up.product(x, experts, sorted, compute)?;
        let width = gate_up.dim(-1);
        let mut shape = gate_up.shape().to_vec();
        let rows = gate_up.reshape(&[-1, width])?;
        let gated = self.gate.of(&rows, compute.path)?;
        if let Some(last) = shape.last_mut() {
            *last = width / 2;
        }
        self.down.product(&gated.reshape(&shape)?, experts, sorted, compute)
    }

    /// The weights as our own products take them, if they do and if that pays.
    fn own(&self, experts: &Array, dtype: Dtype, compute: Compute) -> Option<(Weights<'_>, Weights<'_>)> {
        let (gate_up, down) = (self.gate_up.weights()?, self.down.weights()?);
        let count = self.gate_up.weight.shape().first().copied().unwrap_or(1);
        let pairs = experts.size() as i32;
        let packed = matches!(gate_up, Weights::FourBits { .. });
        let few = pairs <= count.saturating_mul(OWN_EXPERT_ROWS)
            && !(packed && self.gate_up.dense_pays(pairs, compute));
        let fits = |weights| compute.products.rows(weights) > 0 && products::fits(1, weights, dtype);
        let own =
            compute.path == Path::Kernel && self.gate == Gate::Silu && few && fits(gate_up) && fits(down);
        own.then_some((gate_up, down))
    }

    /// Experts `[tokens, each]` and their weights.
    fn route(&self, x: &Array) -> Result<(Array, Array)> {
        let Routing { scores, normalized, factor, groups } = self.routing;
        let logits = self.router.forward(x, Between::default())?;
        let all = match scores {
            Scores::SoftmaxOfAll => softmax_axis(&logits, -1, true)?,
            Scores::SoftmaxOfTaken => logits,
            Scores::Sigmoid => sigmoid(logits.as_dtype(Dtype::Float32)?)?,
        };
        let ranked = match &self.correction {
            Some(correction) => all.add(correction)?,
            None => all.clone(),
        };
        let ranked = match groups {
            Some(groups) => best_groups(&ranked, groups, self.correction.is_some())?,
            None => ranked,
        };
        let order = argpartition_axis(ranked.negative()?, self.each - 1, -1)?;
        let experts = raw::slice(&order, &[0, 0], &[x.dim(0), self.each])?;
        let mut weights = take_along_axis(&all, &experts, -1)?;
        if scores == Scores::SoftmaxOfTaken {
            weights = softmax_axis(&weights, -1, true)?;
        }
        if normalized {
            weights = weights.divide(weights.sum_axis(-1, true)?)?;
        }
        if factor != 1.0 {
            weights = weights.multiply(Array::from_f32(factor).as_dtype(weights.dtype())?)?;
        }
        Ok((experts, weights))
    }

    pub(super) fn arrays(&self) -> Vec<&Array> {
        let shared = self.shared.iter().flat_map(|shared| [&shared.gate_up, &shared.down]);
        let linears = shared.chain([&self.router]).flat_map(Linear::arrays);
        linears.chain(self.gate_up.arrays()).chain(self.down.arrays()).chain(&self.correction).collect()
    }
}

/// `ranked [tokens, experts]` with 0 in all but the best groups: those whose best expert is the highest, or whose two best
/// are together.
fn best_groups(ranked: &Array, groups: Groups, by_two: bool) -> Result<Array> {
    let (tokens, experts) = (ranked.dim(0), ranked.dim(1));
    if groups.taken >= groups.count {
        return Ok(ranked.clone());
    }
    let split = ranked.reshape(&[tokens, groups.count, experts / groups.count])?;
    let of_group =
        if by_two { topk_axis(&split, 2, -1)?.sum_axis(-1, true)? } else { split.max_axis(-1, true)? };
    // The best of those that are left out.
    let left_out = groups.count - groups.taken;
    let order = argpartition_axis(&of_group, left_out - 1, 1)?;
    let border = raw::slice(&order, &[0, left_out - 1, 0], &[tokens, left_out, 1])?;
    let border = take_along_axis(&of_group, &border, 1)?;
    let zero = Array::from_f32(0.0).as_dtype(ranked.dtype())?;
    select(gt(&of_group, &border)?, &split, zero)?.reshape(&[tokens, experts])
}

/// All experts of a stack, `[experts, out, in]`.
fn unpacked(packed: &Packed, dtype: Dtype, compute: Compute) -> Result<Array> {
    let rows = |array: &Array| array.reshape(&[-1, array.dim(-1)]);
    let shape = packed.shape();
    match Weights::of_packed(packed) {
        Some(weights @ Weights::FourBits { words, scales, biases, .. })
            if compute.products.four_bits > 0 && products::fits(1, weights, dtype) =>
        {
            products::dequantize(&rows(words)?, &rows(scales)?, &rows(biases)?)?.reshape(&shape)
        }
        _ => packed.dense(dtype),
    }
}

impl Stack {
    /// Part 0, 1 or 2: gate, up or down.
    fn load(
        tensors: &mut Tensors,
        prefix: &str,
        spec: &ExpertsSpec,
        part: usize,
    ) -> std::result::Result<Self, LoadError> {
        let stacked = format!("{prefix}{}.{}", spec.stacked, PARTS[part]);
        if tensors.contains(&format!("{stacked}.weight")) {
            let weight = tensors.weight(&stacked)?;
            return Ok(Self { weight, bias: tensors.take_optional(&format!("{stacked}.bias"))? });
        }
        let blocks =
            format!("{prefix}{}.{}", spec.stacked, if part == 2 { "down_proj" } else { "gate_up_proj" });
        if tensors.contains(&format!("{blocks}_blocks")) {
            return Self::of_blocks(tensors, &blocks, part);
        }
        let mut each = Vec::new();
        for expert in 0..spec.count {
            each.push(tensors.weight(&format!("{prefix}experts.{expert}.{}", spec.single[part]))?);
        }
        let packed = each.iter().map(|weight| match weight {
            Weight::Packed(packed) => Some(packed.clone()),
            Weight::Dense(_) => None,
        });
        let weight = match packed.collect::<Option<Vec<_>>>() {
            Some(packed) => Weight::Packed(Packed::stacked(&packed)?),
            None => {
                let dtype = each.iter().find_map(|weight| match weight {
                    Weight::Dense(array) => Some(array.dtype()),
                    Weight::Packed(_) => None,
                });
                let dtype = dtype.unwrap_or(Dtype::Float32);
                let dense = each.iter().map(|weight| weight.dense(dtype)).collect::<Result<Vec<_>>>()?;
                Weight::Dense(stack(&dense, 0)?)
            }
        };
        Ok(Self { weight, bias: None })
    }

    /// OpenAI's own layout: bytes of two MXFP4 codes, and rows of gate and up in turn.
    fn of_blocks(tensors: &mut Tensors, name: &str, part: usize) -> std::result::Result<Self, LoadError> {
        let (blocks, scales, bias) = if part == 0 {
            // Up takes the other rows of the same tensors.
            let get = |end: &str| tensors.get(&format!("{name}_{end}"));
            (get("blocks")?, get("scales")?, get("bias")?)
        } else {
            let mut take = |end: &str| tensors.take(&format!("{name}_{end}"));
            (take("blocks")?, take("scales")?, take("bias")?)
        };
        let &[experts, rows, groups, bytes] = blocks.shape() else {
            let reason = format!("has the shape {:?}; four axes are needed", blocks.shape());
            return Err(LoadError::Tensor {
                name: format!("{name}_blocks"),
                origin: "the model".to_owned(),
                reason,
            });
        };
        let words = blocks.reshape(&[experts, rows, groups * bytes])?.view_dtype(Dtype::Uint32)?;
        let packing = Packing { group_size: 32, bits: 4, mode: Mode::Mxfp4 };
        let halves = |array: &Array, axis: i32| -> Result<Array> {
            if part == 2 {
                return Ok(array.clone());
            }
            let rows: Vec<i32> = (part as i32..array.dim(axis)).step_by(2).collect();
            array.take_axis(Array::from_slice(&rows, &[rows.len() as i32]), axis)
        };
        let packed = Packed { words: halves(&words, 1)?, scales: halves(&scales, 1)?, biases: None, packing };
        Ok(Self { weight: Weight::Packed(packed), bias: Some(halves(&bias, 1)?) })
    }

    fn joined(gate: Self, up: Self, compute: Compute) -> Result<Self> {
        let bias = match (gate.bias, up.bias) {
            (Some(gate), Some(up)) => Some(compute.cast(concatenate(&[gate, up], 1)?)?),
            _ => None,
        };
        Ok(Self { weight: compute.joined(vec![gate.weight, up.weight], 1)?, bias })
    }

    fn applied(self, compute: Compute) -> Result<Self> {
        let bias = self.bias.map(|bias| compute.cast(bias)).transpose()?;
        Ok(Self { weight: compute.apply(self.weight)?, bias })
    }

    fn product(&self, x: &Array, experts: &Array, sorted: bool, compute: Compute) -> Result<Array> {
        let dense = |weight: &Array| gather_mm(x, weight.swap_axes(1, 2)?, None, experts, sorted);
        let product = match &self.weight {
            Weight::Dense(weight) => dense(weight)?,
            Weight::Packed(packed) if sorted && self.dense_pays(experts.dim(0), compute) => {
                dense(&unpacked(packed, x.dtype(), compute)?)?
            }
            Weight::Packed(packed) => packed.gathered_product(x, experts, sorted)?,
        };
        match &self.bias {
            Some(bias) => product.add(bias.take_axis(experts, 0)?.expand_dims(-2)?),
            None => Ok(product),
        }
    }

    /// As our own products take it, if they may.
    fn weights(&self) -> Option<Weights<'_>> {
        match (&self.weight, &self.bias) {
            (Weight::Dense(weight), None) => Some(Weights::Dense(weight)),
            (Weight::Packed(packed), None) => Weights::of_packed(packed),
            _ => None,
        }
    }

    /// Whether so many pairs are worth turning all experts into dense ones first.
    fn dense_pays(&self, pairs: i32, compute: Compute) -> bool {
        let experts = self.weight.shape().first().copied().unwrap_or(1);
        pairs >= compute.dense_rows.saturating_mul(DENSE_EXPERT_ROWS).saturating_mul(experts)
    }

    fn arrays(&self) -> Vec<&Array> {
        let weight: Vec<_> = match &self.weight {
            Weight::Dense(array) => vec![array],
            Weight::Packed(packed) => packed.arrays().collect(),
        };
        weight.into_iter().chain(&self.bias).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::Products;
    use mlx_rs::ops::all_close;

    #[test]
    fn experts_made_dense_first_give_the_same_products() {
        let key = mlx_rs::random::key(3).unwrap();
        let dense = mlx_rs::random::normal::<f32>(&[4, 32, 64], None, None, &key).unwrap();
        let x = mlx_rs::random::normal::<f32>(&[12, 1, 64], None, None, &key).unwrap();
        let experts = Array::from_slice(&[0_u32, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3], &[12]);
        let compute = |dense_rows| Compute {
            path: Path::Pure,
            activations: Dtype::Float32,
            dequantize: false,
            products: Products::default(),
            dense_rows,
        };
        for packing in [
            Packing { group_size: 32, bits: 4, mode: Mode::Affine },
            Packing { group_size: 32, bits: 8, mode: Mode::Affine },
            Packing { group_size: 32, bits: 4, mode: Mode::Mxfp4 },
        ] {
            let weight = Weight::Packed(Packed::of(&dense, packing).unwrap());
            let stack = Stack { weight, bias: None };
            // Two rows of each of four experts are eight pairs, of which there are more.
            assert!(stack.dense_pays(12, compute(1)) && !stack.dense_pays(12, compute(2)), "{packing}");
            assert!(!stack.dense_pays(i32::MAX - 1, compute(i32::MAX)), "{packing}");
            let product = |dense_rows| stack.product(&x, &experts, true, compute(dense_rows)).unwrap();
            assert!(all_close(product(1), product(i32::MAX), 1e-4, 1e-4, false).unwrap(), "{packing}");
        }
    }
}
