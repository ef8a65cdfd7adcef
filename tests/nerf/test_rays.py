import pytest
import torch

from cbnerf.nerf.rays import Cameras, Rays, make_rays, make_sub_pixel_rays, ndc_extent, project


def random_pixels(cameras: Cameras, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views and image points (u, v)."""
    generator = torch.Generator().manual_seed(0)
    height, width = cameras.size
    views = torch.randint(len(cameras.camera_to_world), (number,), generator=generator)
    u, v = torch.rand(2, number, generator=generator)
    return views, u * width, v * height


def points_at(rays: Rays, t: torch.Tensor | float) -> torch.Tensor:
    return rays.origins + torch.as_tensor(t)[..., None] * rays.directions


def from_ndc(points: torch.Tensor, cameras: Cameras) -> torch.Tensor:
    """World points, by solving NeRF's appendix C for them."""
    height, width = cameras.size
    z = 2 / (points[..., 2] - 1)
    x = -points[..., 0] * z * width / (2 * cameras.focal)
    y = -points[..., 1] * z * height / (2 * cameras.focal)
    return torch.stack([x, y, z], dim=-1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_points_of_a_ray_project_back_to_its_pixel(tiny_cameras: Cameras, t: float):
    views, u, v = random_pixels(tiny_cameras, 100)
    world = from_ndc(points_at(make_rays(tiny_cameras, views, u, v), t), tiny_cameras)
    poses = tiny_cameras.camera_to_world[views]
    x, y, z = ((world - poses[..., 3])[:, None] @ poses[..., :3])[:, 0].unbind(-1)
    assert (z < 0).all()  # in front of the camera
    torch.testing.assert_close(tiny_cameras.center[0] - tiny_cameras.focal * x / z, u, **CLOSE)
    torch.testing.assert_close(tiny_cameras.center[1] + tiny_cameras.focal * y / z, v, **CLOSE)


def test_ndc_and_world_are_inverse(tiny_cameras: Cameras):
    """A point of a ray, taken back to the world, is seen at the pixel that the ray went through."""
    u, v = torch.tensor([3.5, 40.0, 60.5]), torch.tensor([2.5, 20.0, 47.0])
    for view in (0, 4):
        rays = make_rays(tiny_cameras, torch.full((3,), view), u, v)
        for t in (0.0, 0.3, 0.9):
            points = from_ndc(rays.origins + t * rays.directions, tiny_cameras)
            torch.testing.assert_close(points[:, 2], torch.full((3,), -1 / (1 - t)))
            seen = project(points, tiny_cameras, view)
            torch.testing.assert_close(seen, torch.stack([u, v], dim=1), atol=1e-3, rtol=0)


CLOSE = {"atol": 5e-3, "rtol": 1e-4}  # pixels; far points come from 1 - t in float32


def test_metric_depth_is_one_over_one_minus_t(tiny_cameras: Cameras):
    rays = make_rays(tiny_cameras, *random_pixels(tiny_cameras, 5))
    for t in (0.0, 0.25, 0.5, 0.8):
        depth = -from_ndc(points_at(rays, t), tiny_cameras)[:, 2]
        torch.testing.assert_close(depth, torch.full_like(depth, 1 / (1 - t)))


def test_rays_start_on_the_near_plane_and_end_at_infinity(tiny_cameras: Cameras):
    rays = make_rays(tiny_cameras, *random_pixels(tiny_cameras, 50))
    torch.testing.assert_close(rays.origins[:, 2], -torch.ones(50))
    torch.testing.assert_close(rays.directions[:, 2], torch.full((50,), 2.0))


def test_the_central_camera_sees_the_cube(tiny_cameras: Cameras):
    height, width = tiny_cameras.size
    camera = tiny_cameras._replace(camera_to_world=torch.eye(3, 4)[None])
    corner = make_rays(camera, torch.zeros(1, dtype=torch.int64), *torch.tensor([[width], [0.0]]))
    for t in (0.0, 0.7, 1.0):
        torch.testing.assert_close(points_at(corner, t), torch.tensor([[1.0, 1.0, 2 * t - 1]]))


@pytest.mark.parametrize("scale", [2, 3])
def test_sub_pixel_rays_of_an_upright_camera_average_to_the_pixel_centre(
    tiny_cameras: Cameras, scale: int
):
    position = torch.tensor([[0.2], [-0.1], [0.05]])
    camera = tiny_cameras._replace(camera_to_world=torch.cat([torch.eye(3), position], 1)[None])
    views, rows, columns = torch.tensor([[0, 0], [3, 7], [0, 11]])
    every = torch.arange(scale**2).expand(2, -1)
    rays = make_sub_pixel_rays(camera, views, rows, columns, scale, every)
    middle = make_rays(camera, views, (columns + 0.5) * scale, (rows + 0.5) * scale)
    torch.testing.assert_close(rays.origins.mean(1), middle.origins)
    torch.testing.assert_close(rays.directions.mean(1), middle.directions)


def test_sub_pixels_are_numbered_row_by_row(tiny_cameras: Cameras):
    views, rows, columns = torch.tensor([[1, 4], [3, 0], [5, 2]])
    chosen = torch.tensor([[4, 0, 5], [1, 3, 2]])
    rays = make_sub_pixel_rays(tiny_cameras, views, rows, columns, 3, chosen)
    for pixel in range(2):
        for sub_ray, number in enumerate(chosen[pixel].tolist()):
            down, right = divmod(number, 3)
            u, v = 3 * columns[pixel] + right + 0.5, 3 * rows[pixel] + down + 0.5
            expected = make_rays(tiny_cameras, views[pixel], u, v)
            torch.testing.assert_close(rays.origins[pixel, sub_ray], expected.origins)
            torch.testing.assert_close(rays.directions[pixel, sub_ray], expected.directions)


def test_ndc_extent_encloses_all_rays_tightly(tiny_cameras: Cameras):
    extent = ndc_extent(tiny_cameras)
    rays = make_rays(tiny_cameras, *random_pixels(tiny_cameras, 20_000))
    for t in (0.0, 0.5, 1.0):
        reached = points_at(rays, t)[:, :2].abs().amax(0)
        bound = (1 - t) * extent[0] + t * extent[1]
        assert (reached <= bound + 1e-5).all()
        if t != 0.5:
            assert (reached > 0.95 * bound).all()
