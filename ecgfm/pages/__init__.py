"""What people read: reports, cards, the page of saliency. Facts in, text out; equal facts give equal bytes."""
